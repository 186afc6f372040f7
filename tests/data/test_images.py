"""Images: every form of a source gives the same ones, odd ones get the right pixels, broken ones are named, and batches follow a seed."""

from __future__ import annotations

import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image

from lora_jax.data.image_batches import Augment, ImageCache, ImageExamples, ImagePlan
from lora_jax.data.images import BrokenImage, StoredImage, fitted, load_images, values_of
from lora_jax.errors import InputError
from lora_jax.weights.pixels import PixelSpec, read_pixel_spec
from tests.tiny_images import save_folders, squares

SPEC = PixelSpec((16, 16))
NAMES = ("blue", "green", "red")


def decoded(table):
    """(images, labels) of a table, in the order of the images' bytes."""
    found = [(values_of(image.decode(3)).tobytes(), label) for image, label in zip(table["image"], table["label"], strict=True)]
    return sorted(found)


def load(source, **options):
    return load_images(str(source), key="task.source", image="image", label="label", **options)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_every_form_of_a_source_gives_the_same_images(tmp_path):
    import datasets

    images, labels = squares(12, side=20)
    named = [NAMES[label] for label in labels]
    save_folders(tmp_path / "folders")
    wanted = decoded(load(tmp_path / "folders"))
    assert decoded(load(tmp_path / "folders" / "train")) == wanted
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.array(named), x_test=images[:2], y_test=np.array(named[:2]))
    assert decoded(load(tmp_path / "a.npz")) == wanted
    assert load(tmp_path / "a.npz", splits=("test",)).num_rows == 2
    rows = datasets.Dataset.from_dict({"image": [Image.fromarray(i) for i in images], "label": named})
    rows.to_parquet(tmp_path / "a.parquet")
    assert decoded(load(tmp_path / "a.parquet")) == wanted
    lines = ["image,label\n", *(f"folders/train/{NAMES[n]}/{i}.png,{NAMES[n]}\n" for i, n in enumerate(labels))]
    (tmp_path / "a.csv").write_text("".join(lines))
    assert decoded(load(tmp_path / "a.csv")) == wanted


def test_idx_files_give_grey_images_and_their_labels(tmp_path):
    images, labels = squares(6)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[..., 0])))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels.astype(np.uint8))))
    table = load(tmp_path)
    assert table["label"] == [str(n) for n in labels]
    assert np.array_equal(values_of(table["image"][4].decode(1))[..., 0], images[4, ..., 0])
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[..., 0]))[:40])
    with pytest.raises(InputError, match="train-images-idx3-ubyte.gz cannot be read as an idx file"):
        load(tmp_path)


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return StoredImage("it", data=buffer.getvalue())


def test_odd_images_get_the_right_pixels():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = encoded(Image.fromarray(ramp))
    assert np.array_equal(values_of(grey.decode(3)), np.repeat(ramp[..., None], 3, 2))
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)  # 16 bits a pixel: Pillow's own conversion makes nearly all of it white
    assert np.array_equal(values_of(encoded(deep).decode(3))[..., 0], ramp)
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    red = values_of(encoded(cmyk, "TIFF").decode(3))[0, 0]
    assert red[0] > 200 and red[1:].max() < 60
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert values_of(encoded(clear).decode(3))[0, 0].tolist() == [10, 20, 30]
    one = encoded(Image.new("RGB", (1, 1), (7, 8, 9)))
    assert (values_of(fitted(one.decode(3), SPEC)) == [7, 8, 9]).all()
    long = encoded(Image.new("RGB", (200, 1), (7, 8, 9)))
    assert values_of(fitted(long.decode(3), SPEC)).shape == (16, 16, 3)
    turned = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera that was held upright
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert values_of(StoredImage("it", data=buffer.getvalue()).decode(1)).shape == (3, 2, 1)
    assert np.array_equal(values_of(StoredImage("it", data=ramp / 255).decode(1))[..., 0], ramp)


@pytest.mark.parametrize("values", [np.full((2, 2), 300.0), np.zeros((2, 2, 5)), np.array([[-1, 2]])])
def test_arrays_that_are_no_images_are_refused(values):
    with pytest.raises(BrokenImage, match="it: "):
        StoredImage("it", data=values).decode(3)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "text.jpg").write_text("this is a text")
    with pytest.raises(BrokenImage, match=r"text\.jpg: no image that can be decoded \(it is of no format that is known\)"):
        load(tmp_path)["image"][0].decode(3)
    whole = io.BytesIO()
    Image.fromarray(squares(1, side=64)[0][0]).save(whole, "JPEG")
    with pytest.raises(BrokenImage, match="no image that can be decoded"):
        StoredImage("it", data=whole.getvalue()[:700]).decode(3)
    with pytest.raises(InputError, match="images but no labels"):
        load(tmp_path / "a")


def examples(count=20, **augment):
    images, labels = squares(count, side=24)
    stored = [StoredImage(f"image {i}", data=image) for i, image in enumerate(images)]
    cache = ImageCache(10**9)
    return ImageExamples(stored, labels.astype(np.int32), SPEC, 17, cache, Augment(**augment), workers=2)


RANDOM = {"crop": (0.3, 1.0), "flip": 0.5, "jitter": 0.3, "mixup": 0.4}


def test_a_batch_follows_from_the_seed_and_its_step_alone():
    plans = [ImagePlan(examples(**RANDOM), examples(), batch_size=6, accumulate=2, seed=seed, steps=9) for seed in (0, 0, 1)]
    later, again, other = ([plan.batch(step) for step in (8, 0)] for plan in plans)
    plans[1].batch(3)  # whatever was asked for before
    for a, b in zip(later, again, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a["pixels"], b["pixels"]) for a, b in zip(later, other, strict=True))
    assert all(np.array_equal(a["pixels"], b["pixels"]) for a, b in zip(plans[0].batches(0, 2), map(plans[1].batch, range(2)), strict=True))


def test_each_epoch_sees_every_image_once_and_otherwise():
    plan = ImagePlan(examples(18, crop=(0.3, 0.6)), examples(), batch_size=6, steps=9)
    first, second = ([plan.batch(step) for step in range(start, start + 3)] for start in (0, 3))
    for epoch in (first, second):
        assert sorted(np.concatenate([b["target_ids"][0] for b in epoch]).tolist()) == sorted((np.arange(18) % 3).tolist())
    pixels = [{p.tobytes() for b in epoch for p in b["pixels"][0]} for epoch in (first, second)]
    assert not pixels[0] & pixels[1]


def test_mixup_gives_each_image_two_targets_whose_weights_add_up_to_one():
    plan = ImagePlan(examples(mixup=0.4), examples(), batch_size=8, steps=2)
    batch = plan.batch(0)
    weights = batch["target_weights"].reshape(8, 2)
    assert np.allclose(weights.sum(1), 1) and (weights < 1).any()
    assert np.array_equal(batch["target_index"].reshape(8, 2)[:, 0], np.arange(8) * 17)
    whole = examples()
    chosen = plan._chosen(0)[1]
    random = np.random.default_rng(np.random.SeedSequence([0, 0, 0x313]))
    other = chosen[random.permutation(8)]
    mixed = weights[:, :1, None, None] * np.stack([whole.pixels(i) for i in chosen]).astype(float)
    mixed += weights[:, 1:, None, None] * np.stack([whole.pixels(i) for i in other])
    assert np.abs(batch["pixels"][0] - mixed).max() <= 0.51


def test_evaluations_see_every_image_once_and_unchanged():
    part = examples(13, flip=1.0)
    plan = ImagePlan(examples(), part, batch_size=6, row_multiple=4, steps=2)
    batches = plan.eval_batches()
    assert len(batches) == 3 and batches[2]["pixels"].shape == (8, 16, 16, 3)
    assert [int(b["target_weights"].sum()) for b in batches] == [6, 6, 1]
    assert batches[2]["segment_ids"].sum() == 17
    assert np.array_equal(batches[1]["pixels"][0], part.pixels(6)) and np.array_equal(plan.eval_groups()[1], np.arange(6, 12))


def test_a_cache_keeps_to_its_limit_and_gives_the_same_bytes():
    images = [StoredImage(str(i), data=np.full((4, 4, 3), i, np.uint8)) for i in range(5)]
    for in_file in (False, True):
        cache, made = ImageCache(100, in_file=in_file), []

        def make(image, made=made):
            made.append(image)
            return values_of(image.decode(3))

        for image in images * 2:
            assert (cache.get(image, "it", lambda image=image: make(image)) == int(image.name)).all()
        assert len(made) == 5 + 3  # two fit


def test_what_checkpoints_say_of_their_images(tmp_path):
    def spec(**values):
        import json

        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        return read_pixel_spec(tmp_path, {"image_size": 224})

    cut = spec(
        image_processor_type="BitImageProcessor", size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, do_center_crop=True
    )
    assert cut.size == (224, 224) and cut.resized == (256, 256) and not cut.squash and cut.interpolation == "bicubic"
    squashed = spec(
        image_processor_type="ViTImageProcessor", size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2
    )
    assert squashed == PixelSpec((224, 224), (0.5,) * 3, (0.5,) * 3, 1.0, True, "bilinear")
    small, large = (spec(image_processor_type="ConvNextImageProcessor", size={"shortest_edge": n}, crop_pct=0.875) for n in (224, 384))
    assert small.resized == (256, 256) and not small.squash and large.resized == (384, 384) and large.squash
    twice = spec(image_processor_type="EfficientNetImageProcessor", size={"height": 8, "width": 8}, include_top=True, image_std=[0.5] * 3)
    assert twice.std == (0.25,) * 3
    minus = spec(size={"height": 8, "width": 8}, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False)
    assert minus.mean == (0.5,) * 3 and minus.std == (0.5,) * 3
    (tmp_path / "preprocessor_config.json").unlink()
    timm = {"input_size": [3, 240, 240], "crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.1] * 3, "std": [0.2] * 3}
    assert read_pixel_spec(tmp_path, {"pretrained_cfg": timm}) == PixelSpec((240, 240), (0.1,) * 3, (0.2,) * 3, 0.9)
    with pytest.raises(InputError, match="interpolation 'round' is not supported"):
        read_pixel_spec(tmp_path, {"pretrained_cfg": timm | {"interpolation": "round"}})
