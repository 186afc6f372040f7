"""How PEFT's files hold a method (`PeftForm`): the options of its config, and the names, shapes and axes of its tensors.

Each method that PEFT has too says it in its own file, as `Method.peft`; `interop/peft/` reads and writes files by these and names no
method. What is alike for all types is not said here: which modules a config means, trained biases, modules saved in full.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...config.patterns import Patterns
from ...config.types import LARGEST_RANK
from ...errors import InputError
from ..sites import Site

# Options that every type has, with the values of a new file.
GENERAL: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "peft_version": "0.21.2", "revision": None,
    "task_type": None,
}  # fmt: skip

# Options that say which modules are adapted, saved or trained: a type has those of them that are among its defaults.
PLACES = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "modules_to_save")

Weight = Callable[[], np.ndarray]


class PeftForm:
    """A method in PEFT's files.

    A method fills in the attributes, and writes `tensors`, `to_file` and `from_file`; one that names
    `modules` leaves these out. The other functions have defaults that fit most.
    Each key of `defaults` is in exactly one of `words`, `flags`, `notes`, `unsupported`, `own` and `PLACES`.

    Attributes:
        peft_type: PEFT's name of the type: `LORA`.
        prefix: what the names of its tensors begin with, after the module's name and a dot: `lora_`.
        defaults: the options of its config class beside `GENERAL`, all of them, with PEFT's default values, as JSON holds them.
        words: our key -> PEFT's option: `rank`, `alpha`, `dropout`, `rank_pattern` and `alpha_pattern` where the type has them, and the
            method's own. A key that is left out is one that PEFT's config cannot say, such as an alpha where there is no scale.
        flags: option -> value, where they tell the method from others of the same type: `{"use_dora": True}`.
        own: options that `values` and `fields` translate in code of the method's.
        notes: options that change nothing once the tensors are there; they are written again as they were read.
        unsupported: option -> why it has to be off, or at its default.
        only: PEFT's word for our `bias: lora_only`.
        integers: names of tensors that hold whole numbers: indices.
        optional: names of tensors that a file may lack.
        repeated: those of `shared` that PEFT writes at every module as well; they are compared when read, and not written.
        numbered: those of a module's tensors that stand at the root of the file, with the module's number among the adapted ones.
        conv1d: whether PEFT adapts GPT-2's `Conv1D` by it.
        convolutions: whether PEFT adapts convolutions by it, as the method does.
        modules: a regular expression for our names of the modules of the base whose own numbers a file holds under `prefix`, where
            that is what the type trains. Such a type adapts no site, and its method says nothing of tensors.
    """

    peft_type: str
    prefix: str
    defaults: Mapping[str, Any]
    words: Mapping[str, str] = {}
    flags: Mapping[str, Any] = {}
    own: frozenset[str] = frozenset()
    notes: frozenset[str] = frozenset()
    unsupported: Mapping[str, str] = {}
    only: str = "lora_only"
    integers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    conv1d: bool = True
    convolutions: bool = False
    modules: str = ""

    # The config

    def check(self, read: Reader) -> None:
        """`InputError` where an option has a value that we do not have, beyond what `unsupported` says."""

    def values(self, read: Reader) -> dict[str, Any]:
        """The keys of our section that the options say: those of `words`. Which modules are meant is read elsewhere.

        Raises:
            InputError: an option has a wrong value.
        """
        found: dict[str, Any] = {}
        for key, option in self.words.items():
            default = self.defaults[option]
            if key == "rank":
                found[key] = read.rank(option, default)
            elif key == "alpha":
                found[key] = read.number(option, default, lowest=1e-30)
            elif key == "dropout":
                found[key] = read.number(option, default, lowest=0.0, below=1.0)
            elif key in ("rank_pattern", "alpha_pattern"):
                found[key] = read.patterns(option, whole=key == "rank_pattern")
            elif isinstance(default, bool):
                found[key] = read.flag(option, default)
            elif isinstance(default, int):
                found[key] = read.whole(option, default)
            elif isinstance(default, float):
                found[key] = read.number(option, default, lowest=-math.inf)
            else:
                found[key] = read.raw.get(option, default)
        return found

    def fields(self, section: Any) -> dict[str, Any]:
        """The options that say a section: what `values` reads again.

        Raises:
            InputError: PEFT has no option for a value.
        """
        return {option: _as_written(getattr(section, key), self.defaults[option]) for key, option in self.words.items()} | dict(self.flags)

    def placed(self, section: Any, modules: Mapping[str, Site], read: Reader) -> Any:
        """The section, with what the options say of modules by name put in the names of our sites.

        Args:
            section: of `values`.
            modules: PEFT's name of each adapted module -> its site.
            read: the options.

        Raises:
            InputError: they say something of some layers of a site and not of others.
        """
        return section

    def places(self, section: Any, modules: Mapping[str, Site]) -> dict[str, Any]:
        """Options that say what the section says of sites by PEFT's names of the modules; written where every module is named outright.

        Args:
            section: the member's.
            modules: PEFT's name of each adapted module -> its site.
        """
        return {}

    def rank_of(self, section: Any, module: str, rank: int, read: Reader) -> int:
        """The rank of a module's tensors in the file; 0 where it has none.

        Args:
            section: the config's.
            module: PEFT's name of it.
            rank: as `r` and `rank_pattern` say.
            read: the options.
        """
        return rank

    def rank_at(self, site: Site, rank: int, read: Reader) -> int:
        """The rank at a site for what `rank_of` says, where PEFT makes another of it for the site's shape."""
        return rank

    # The tensors of a module

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape, of one module's tensors. The name is what follows the module's: `lora_A.weight`, without an adapter's name."""
        raise NotImplementedError

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A module's tensors.

        Args:
            section: the member's.
            site: the site; a stacked one has the module as a layer.
            rank: of the layer.
            arrays: the method's arrays and settings of the layer, by name, without padding; those of the whole adapter too.

        Returns:
            name -> array of the shape that `tensors` says.
        """
        raise NotImplementedError

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        """The arrays of a layer, and settings that do not follow from the section alone; those left out stay at their fill value.

        Args:
            section, site, rank: as above.
            tensors: what the file holds, float32; without those of `optional` that it lacks.
            weight: gives the base's weight of the layer, (inputs, outputs) float32, for what a file leaves to be computed again.
        """
        raise NotImplementedError

    # The tensors of the adapter

    def shared(self, section: Any, sites: Mapping[Site, int]) -> dict[str, tuple[int, ...]]:
        """Name -> shape, of tensors that belong to no module: `vera_A`, which stands in the file as `base_model.vera_A`.

        Args:
            section: the member's.
            sites: each adapted site, with its largest rank.
        """
        return {}

    def shared_to_file(self, section: Any, sites: Mapping[Site, int], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those tensors, of the method's arrays of scope `adapter`, by name and without padding."""
        return {}

    def shared_from_file(self, section: Any, sites: Mapping[Site, int], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of scope `adapter`, of what the file holds; those that are `optional` it may lack, and they are drawn here."""
        return {}


def kernel_shape(site: Site, rows: int) -> tuple[int, ...]:
    """PyTorch's shape of a matrix (rows, inputs): of a convolution (rows, channels, height, width)."""
    return (rows, site.inputs // math.prod(site.window), *site.window)


def as_kernel(site: Site, matrix: np.ndarray) -> np.ndarray:
    """A matrix (rows, inputs), whose inputs are the channels of each place of the window, as `kernel_shape` says."""
    return np.moveaxis(matrix.reshape(len(matrix), *site.window, -1), -1, 1)


def of_kernel(site: Site, kernel: np.ndarray) -> np.ndarray:
    """(rows, inputs); `as_kernel` backwards."""
    return np.moveaxis(kernel, 1, -1).reshape(len(kernel), site.inputs)


def _as_written(value: Any, default: Any) -> Any:
    """A value as people write it: a whole number without its `.0` where the option's default has none."""
    if isinstance(value, dict):
        return {key: plain(v) if isinstance(v, float) else v for key, v in value.items()}
    return plain(value) if isinstance(value, float) and isinstance(default, int) else value


def plain(value: float) -> float:
    """A whole number without its `.0`."""
    return int(value) if float(value).is_integer() else value


def one_of_each_site(modules: Mapping[str, Site], said: Callable[[str], bool], what: str) -> list[str]:
    """The names of the sites of which an option speaks.

    Args:
        modules: PEFT's name of each adapted module -> its site.
        said: whether the option speaks of a module.
        what: the option and the file, for the message.

    Raises:
        InputError: it speaks of some layers of a site and not of others.
    """
    found: dict[str, bool] = {}
    for name, site in modules.items():
        if found.setdefault(site.name, said(name)) != said(name):
            raise InputError(f"{what} names {site.name} in some layers and not in others; that is not supported.")
    return [name for name, yes in found.items() if yes]


def outright(modules: Mapping[str, Site], sites: list[str]) -> str:
    """A regular expression for the modules of these sites, name by name."""
    return "|".join(re.escape(name) for name, site in modules.items() if site.name in sites)


class Reader:
    """Takes typed values out of a JSON object, each `InputError` naming the file and the key."""

    def __init__(self, raw: dict[str, Any], where: str):
        self.raw, self.where, self.expressions = raw, where, Patterns(where)

    def wrong(self, key: str, wanted: str) -> InputError:
        """The error for a value that is not what was wanted."""
        shown = repr(self.raw.get(key))
        return InputError(f"{self.where}: '{key}' should be {wanted}, not {shown if len(shown) < 80 else shown[:77] + '...'}.")

    def rank(self, key: str, default: int) -> int:
        """A whole number above 0, and no larger than any model is wide."""
        value = self.raw.get(key, default)
        if type(value) is not int or not 0 < value <= LARGEST_RANK:
            raise self.wrong(key, f"a whole number from 1 to {LARGEST_RANK}")
        return value

    def whole(self, key: str, default: int) -> int:
        """A whole number."""
        value = self.raw.get(key, default)
        if type(value) is not int or not abs(value) < 2**63:
            raise self.wrong(key, "a whole number")
        return value

    def number(self, key: str, default: float, *, lowest: float, below: float = math.inf) -> float:
        """A finite number."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value) or not lowest <= value < below:
            least = f" from {lowest:g}" if lowest > -math.inf else ""
            raise self.wrong(key, "a number" + least + (f" to below {below:g}" if below < math.inf else " on" if least else ""))
        return value  # not made a float: 16 is saved again as 16

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """One of a few words."""
        value = self.raw.get(key, default)
        if value not in choices:
            raise self.wrong(key, "one of " + ", ".join(choices))
        return value

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of names, or None."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise self.wrong(key, "a list of names")
        return tuple(value)

    def modules(self, key: str) -> str | tuple[str, ...] | None:
        """A list of names, a regular expression, or None."""
        value = self.raw.get(key)
        if not isinstance(value, str):
            return self.names(key)
        self.expressions.check(key, value)
        return value

    def patterns(self, key: str, *, whole: bool) -> dict[str, float]:
        """Regular expression -> number above 0."""
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object of patterns and numbers")
        for pattern, number in value.items():
            self.expressions.check(key, pattern)
            good = type(number) is int if whole else isinstance(number, int | float) and not isinstance(number, bool)
            if whole and type(number) is int and number > LARGEST_RANK:
                raise InputError(f"{self.where}: '{key}' gives {pattern[:60]!r} a rank above {LARGEST_RANK}.")
            if not good or not _finite(number) or number <= 0:
                raise InputError(f"{self.where}: '{key}' gives {pattern[:60]!r} the value {number!r}, which is not above 0.")
        return value

    def layers(self, key: str) -> tuple[int, ...] | None:
        """Layer numbers; None where all are meant (PEFT takes an empty list so, too)."""
        value = self.raw.get(key)
        value = [value] if type(value) is int else value
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            raise self.wrong(key, "a layer number or a list of them")
        return tuple(value)

    def named(self, names: str | tuple[str, ...] | None, module: str) -> bool:
        """Whether a module is meant: a regular expression is of its whole name, names in a list end it."""
        if isinstance(names, str):
            return bool(names) and self.expressions.match(names, module) is not None
        return bool(names) and any(module == n or module.endswith(f".{n}") for n in names)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
