import itertools
import math
from io import BytesIO

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from lora_jax.analysis import write_heatmap
from lora_jax.analysis.heatmap import _ending, choose_axes, grid_of, heatmap_png
from lora_jax.errors import InputError
from lora_jax.tasks.evaluators import ACCURACY, LOSS
from lora_jax.tracking import MemberResult

RANK, TARGETS, RATE, SEED = "adapter.rank", "adapter.targets", "optimizer.learning_rate", "training.seed"


def results(**axes):
    """One member a combination; `value(settings)` gives its accuracy, NaN for diverged."""
    value = axes.pop("value", lambda s: 0.5 + s.get(RANK, 0) / 1000)
    found = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values))
        accuracy = value(settings)
        status = "diverged" if math.isnan(accuracy) else "finished"
        found.append(MemberResult(str(settings), settings, 100, status, {"accuracy": accuracy, "loss": 1 - accuracy}))
    return found


def sweep(**more):
    return results(**{RANK: [16, 4], TARGETS: ["mlp", ["q_proj", "v_proj"]]}, **more)


def test_rank_and_targets_are_the_axes_by_default():
    assert choose_axes(results(**{SEED: [0, 1, 2], RATE: [1e-4, 1e-3], TARGETS: ["a", "b"], RANK: [4, 8]})) == (RANK, TARGETS)
    assert choose_axes(results(**{SEED: [0, 1, 2, 3], RATE: [1e-4, 1e-3], "adapter.alpha": [1, 2, 3]})) == ("adapter.alpha", RATE)
    assert choose_axes(results(**{RANK: [4, 8], RATE: [1e-4, 1e-3]}), x_key=RATE) == (RATE, RANK)
    assert choose_axes(results(**{RANK: [4]})) == (None, None)
    with pytest.raises(InputError, match="Did you mean 'adapter.rank'"):
        choose_axes(sweep(), x_key="adapter.rnk")


def test_cells_are_means_over_seeds_at_the_best_learning_rate():
    def value(s):
        if s[RATE] == 1e-1:
            return math.nan if s[SEED] == 1 else 0.99  # diverges with one seed: not taken, however good the other
        return s[RANK] / 100 + {1e-4: 0.0, 1e-3: 0.2}[s[RATE]] + (0.0, 0.1)[s[SEED]]

    cells, xs, ys = grid_of(sweep(**{RATE: [1e-4, 1e-3, 1e-1], SEED: [0, 1], "value": value}), RANK, TARGETS, ACCURACY)
    assert xs == [4, 16] and len(ys) == 2
    np.testing.assert_allclose(cells, [[0.29, 0.41]] * 2)
    assert np.isnan(grid_of(results(**{RANK: [4, 8], "value": lambda s: math.nan if s[RANK] == 4 else 1.0}), RANK, None, ACCURACY)[0][0, 0])


def test_the_png_is_drawn_and_best_is_bright_in_either_direction(tmp_path):
    path = write_heatmap(tmp_path / "map.png", sweep(), title="reviews", subtitle="MiniLM")
    assert imread(path).shape[0] > 300
    yellow, navy = (np.array(colormaps["cividis"](end)[:3]) for end in (1.0, 0.0))

    def ends(metric):
        image = imread(BytesIO(heatmap_png(results(**{RANK: [4, 16]}), metric=metric)))[..., :3]
        image = image[:, : image.shape[1] * 2 // 3]  # without the colour bar
        near = lambda colour: np.abs(image - colour).max(-1) < 0.03
        return np.mean(np.nonzero(near(yellow))[1]) - np.mean(np.nonzero(near(navy))[1])

    assert ends(ACCURACY) > 50  # rank 16 is on the right, has the higher accuracy ...
    assert ends(LOSS) > 50  # ... and the lower loss


def test_nothing_to_show_is_none(tmp_path):
    assert write_heatmap(tmp_path / "map.png", results(**{RANK: [4]})) is None
    assert write_heatmap(tmp_path / "map.png", results(**{RANK: [4, 8], "value": lambda s: math.nan})) is None
    assert not list(tmp_path.iterdir())
    assert write_heatmap(tmp_path / "map.png", results(**{RANK: [4, 8], "value": lambda s: 0.5})) is not None


def test_labels_are_no_formulas():
    values = {"q$|k$": 0.5, "$\\frac$": 0.6}
    results = [MemberResult(v, {"adapter.targets": v}, 10, "finished", {"accuracy": a}) for v, a in values.items()]
    assert heatmap_png(results, title="$\\x$", subtitle="$_$") is not None


def test_a_cell_without_a_value_says_how_its_members_ended():
    kinds = {2: "stopped", 4: "diverged", 8: "failed", 16: "finished"}
    results = [MemberResult(str(r), {RANK: r}, r, status, {"accuracy": 0.5}) for r, status in kinds.items()]
    assert [_ending(results, RANK, r, None, None) for r in kinds] == ["stopped", "diverged", "failed", "no result"]
