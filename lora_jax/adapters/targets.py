"""Targets: which of a model's sites a config asks for, by presets, names, patterns and layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from ..config.patterns import Patterns, fullmatch, layers_of, parse_layers
from ..errors import InputError, nearest, warn
from ..models.layers import HEAD_MODULES
from .sites import Site, ends_with

PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "query", "key", "value", "out"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1", "fc2"),
}
# Words for all sites of a kind.
KINDS = {"all-linear": "linear", "embedding": "embedding", "convolutions": "convolution", "experts": "expert"}

# Linear layers that PEFT's `all-linear` leaves out as well: the output heads, and a mixture's router.
HEADS = (*HEAD_MODULES, "lm_head", "score", "router")


def matches(site_names: tuple[str, ...], kind: str, pattern: str | list[str], *, lone: bool = False) -> bool:
    """Whether targets (or exclude) name a site.

    A list follows PEFT: an entry is the whole name or its end, cut at a dot. A string is a preset, or a regular expression
    that matches a whole name.

    >>> matches(("layers.0.attn.q_proj",), "linear", ["q_proj"]), matches(("layers.0.attn.q_proj",), "linear", r".*0\\.attn.*")
    (True, True)
    """
    own = site_names[0].rsplit(".", 1)[-1]
    if isinstance(pattern, str):
        if pattern in KINDS:
            named = own in ("embed", "embedding", "embed_tokens", "wte") if pattern == "embedding" else own not in HEADS
            return kind == KINDS[pattern] and named
        if pattern not in PRESETS:
            return any(fullmatch(pattern, name, "adapter.targets or adapter.exclude") for name in site_names)
        if kind != "linear" or (pattern == "attention" and lone):
            return False
        pattern = list(PRESETS[pattern])
        site_names = site_names[:1]
    return any(ends_with(name, entry) for name in site_names for entry in pattern)


def select(
    sites: list[Site],
    targets: str | list[str],
    exclude: str | list[str] | None,
    layers: int | str | list[int] | None,
    passed: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Which layers of which sites a config adapts.

    Args:
        sites: the model's.
        targets, exclude, layers: the config's.
        passed: the model's modules that are no sites (`passed_over`). `all-linear` and `convolutions` warn of them; a target that names
            one is refused.

    Returns:
        site name -> (depth,) bool, or (1,) for a single weight; sites without any are left out.

    Raises:
        InputError: a target, an exclude entry or a layer matches nothing; the message lists the nearest names.
    """
    left = {name: why for name, why in (passed or {}).items() if not (exclude and _names(exclude, name))}
    _check_patterns(sites, "adapter.targets", targets, left)
    _check_patterns(sites, "adapter.exclude", exclude, passed or {})
    chosen = {}
    for site in sites:
        wanted = np.array([_meant(site, n, targets) and not (exclude and _meant(site, n, exclude)) for n in site.names])
        if wanted.any():
            chosen[site.name] = (site, wanted)
    if not chosen:
        raise InputError("adapter.exclude: excludes every module that adapter.targets matches.")
    if layers is not None:
        _keep_layers(chosen, layers, sites)
    if targets in ("all-linear", "convolutions") and left:
        shown = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:6]) + ("; ..." if len(left) > 6 else "")
        warn(f"adapter.targets: '{targets}' passes over {len(left)} ({shown}). Name them in adapter.exclude.")
    return {name: wanted for name, (_, wanted) in chosen.items() if wanted.any()}


def _meant(site: Site, names: tuple[str, ...], pattern: str | list[str]) -> bool:
    return matches(names, site.kind, pattern, lone=site.lone)


def _names(pattern: str | list[str], name: str) -> bool:
    """Whether a pattern names this module, which is no site: presets mean sites alone."""
    return pattern not in (*PRESETS, *KINDS) and matches((name,), "", pattern)


def _check_patterns(sites: list[Site], key: str, pattern: str | list[str] | None, passed: Mapping[str, str]) -> None:
    if isinstance(pattern, str) and pattern not in (*PRESETS, *KINDS):
        Patterns("the adapter's config").check(key, pattern)
    entries: list[str | list[str]] = [] if pattern is None else [pattern] if isinstance(pattern, str) else [[p] for p in pattern]
    for entry in entries:
        word = entry if isinstance(entry, str) else entry[0]
        unfit = next((name for name in passed if _names(entry, name)), None)
        if unfit is not None and key == "adapter.targets":
            raise InputError(f"{key}: '{word}' means {unfit or 'the model'}, which cannot be adapted: {passed[unfit]}.")
        if unfit is None and not any(_meant(s, n, entry) for s in sites for n in s.names):
            raise InputError(f"{key}: '{word}' matches no module. {_suggest(word, sites, isinstance(entry, str), passed)}")


def _suggest(word: str, sites: list[Site], is_string: bool, passed: Mapping[str, str]) -> str:
    if not sites:
        why = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(passed.items())[:4])
        return "The model has no weight that can be adapted" + (
            f" ({why})." if why else ": no linear layer, embedding, convolution or experts."
        )
    endings = list(dict.fromkeys(n.rsplit(".", 1)[-1] for s in sites for n in s.names[0]))
    full = f"Full paths look like {', '.join([s.names[0][0] for s in sites][:4])}."
    if is_string and word in (*PRESETS, *KINDS):
        meaning = f"linear layers called {', '.join(PRESETS[word])}" if word in PRESETS else f"every {KINDS[word]} weight"
        return f"It is a preset: {meaning}. The model's weights are called {', '.join(endings[:20])}. {full}"
    if is_string and word in endings:
        return f"A string is a preset or a regex for the whole path; for the name alone write [{word}]."
    last = re.split(r"[.\\*]", word)[-1] or word
    near = nearest(last, [*endings, *PRESETS, *KINDS])
    return (f"Nearest names: {', '.join(near)}. " if near else f"Names: {', '.join(endings[:20])}. ") + full


def layer_number(name: str) -> int | None:
    """The layer a site's name says it is in: its first all-digit part.

    >>> layer_number("layers.3.attn.q_proj"), layer_number("embed")
    (3, None)
    """
    return next((int(p) for p in name.split(".") if p.isdigit()), None)


def _layer_numbers(sites: Iterable[Site]) -> set[int]:
    return {n for site in sites for names in site.names if (n := layer_number(names[0])) is not None}


def _keep_layers(chosen: dict[str, tuple[Site, np.ndarray]], layers: int | str | list[int], sites: list[Site]) -> None:
    """Each stack's own layers: an encoder-decoder has two. What is in no `Stack` counts its layers together."""
    numbers = _layer_numbers(site for site, _ in chosen.values())
    if not numbers:
        raise InputError("adapter.layers: none of the modules that adapter.targets matches is in a numbered layer.")
    stacks = dict.fromkeys(site.stack for site in sites)
    depths = {s: max(found) + 1 for s in stacks if (found := _layer_numbers(site for site in sites if site.stack == s))}
    # `encoder` of the path `encoder.layers`; a model's only stack has no name.
    names = {s: str(s[-2]) if s and len(s) > 1 and len(depths) > 1 else "" for s in depths}
    known = sorted(name for name in names.values() if name)
    for site, mask in chosen.values():
        name, depth = names.get(site.stack, ""), depths.get(site.stack)
        wanted = parse_layers(layers_of(layers, name, known), depth, f"the {name or 'model'}") if depth else ()
        mask &= np.array([layer_number(own[0]) in wanted for own in site.names])
    if not any(mask.any() for _, mask in chosen.values()):
        raise InputError(f"adapter.layers: {layers!r} leaves no module to adapt (layers with targets: {sorted(numbers)}).")
