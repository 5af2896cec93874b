"""What a case says: its tensors drawn from their names, its digests, and our tensors under its own names."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ZooError, unknown

PROBES = 16
Case = dict[str, Any]
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Config(dict[str, Any]):
    """A case's config: what it does not say is an error with a name, also in its parts."""

    def __missing__(self, key: str) -> Any:
        raise ZooError(f"the case's config does not say {key!r}")

    @classmethod
    def of(cls, value: Any) -> Any:
        """`value` with every mapping in it as one of these."""
        if isinstance(value, Mapping):
            return cls({key: cls.of(entry) for key, entry in value.items()})
        return [cls.of(entry) for entry in value] if isinstance(value, list) else value


def fill(name: str, spec: Mapping[str, Any]) -> np.ndarray | None:
    """The float64 or int64 array that `name` holds under `spec` ("shape", "rule"[, "values"]); None for "keep".

    Raises:
        ZooError: an unknown rule.
    """
    rule, shape = spec["rule"], tuple(spec.get("shape", ()))
    if rule == "keep":
        return None
    if rule == "values":
        return np.asarray(spec["values"])
    if rule in ("zeros", "ones"):
        return np.full(shape, float(rule == "ones"))
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    if rule.startswith("randint:"):
        low, high = map(int, rule.split(":")[1:])
        return draw.randint(low, high, size=shape).astype(np.int64)
    if rule == "uniform":
        return np.asarray(draw.random_sample(shape))
    x = np.asarray(draw.standard_normal(shape))
    by_rule: dict[str, Callable[[], np.ndarray]] = {
        "normal": lambda: x,
        "fan_in": lambda: x / np.sqrt(max(1, int(np.prod(shape[1:])))),
        "fan_in_last_out": lambda: x / np.sqrt(max(1, int(np.prod(shape[:-1])))),
        "small": lambda: 0.1 * x,
        "one": lambda: 1 + 0.1 * x,
        "var": lambda: 0.5 + np.abs(x) / 2,
    }
    if rule not in by_rule:
        raise unknown("fill rule", rule, by_rule)
    return np.asarray(by_rule[rule]())


def _filled(spec: Mapping[str, Any], case: Case, prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, entry in spec.items():
        array = fill(prefix + name, entry)
        if array is not None:
            tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)).to(case.get("device", "cpu"))
            tensors[name] = tensor.to(dtype_of(case)) if tensor.is_floating_point() else tensor
    return tensors


def filled_state(case: Case) -> dict[str, Tensor]:
    """The official state dict of a case, without the entries that are kept, in the case's dtype and on its device."""
    return _filled(case["state"], case, "")


def filled_inputs(case: Case) -> dict[str, Tensor]:
    """The inputs of a case, in its dtype and on its device."""
    return _filled(case["inputs"], case, "input:")


def dtype_of(case: Case) -> torch.dtype:
    return getattr(torch, case.get("dtype", "float64"))


def shape_of(entry: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of an entry of a case's state or inputs."""
    return tuple(entry["shape"]) if "shape" in entry else np.asarray(entry["values"]).shape


def load_filled(network: nn.Module, case: Case, convert: Convert) -> nn.Module:
    """`network` in the case's dtype and on its device, filled by way of `convert` from the official keys.

    Raises:
        ZooError: a key is left over, or one is missing that the case does not keep.
    """
    network = network.to(case.get("device", "cpu"), dtype_of(case))
    filled = convert(filled_state(case))
    report = network.load_state_dict(filled, strict=False)
    kept: set[str] = set()
    if report.missing_keys:  # ours may have other names than the case's
        everything = {key: torch.empty(shape_of(entry)) for key, entry in case["state"].items()}
        kept = _converted(case, everything, convert).keys() - filled.keys()
    if report.unexpected_keys or not set(report.missing_keys) <= kept:
        raise ZooError(f"keys differ: missing {report.missing_keys}, unexpected {report.unexpected_keys}, kept {kept}")
    return network


def _converted(case: Case, values: dict[str, Tensor], convert: Convert) -> dict[str, Tensor]:
    """`convert` of other values than the filled ones."""
    try:
        return convert(values)
    except ZooError:  # it compares fixed tables with its own, and leaves them out
        return convert({key: value for key, value in values.items() if case["state"][key]["rule"] != "keep"})


class Official:
    """Our tensors under the official names and in the official layout.

    The conversion is turned round by sending the number of every official element through it. It may rename, permute,
    cut and join; what it would compute is no longer a number of an element, and is found.

    Args:
        case: names and shapes, in its "state".
        convert: from the official state dict to ours.
    """

    def __init__(self, case: Case, convert: Convert) -> None:
        self._shapes = {name: shape_of(entry) for name, entry in case["state"].items()}
        self._starts: dict[str, int] = {}
        numbers, start = {}, 1  # 0 is of no element: what a conversion fills up with
        for name, shape in self._shapes.items():
            size = int(np.prod(shape))
            numbers[name] = torch.arange(start, start + size, dtype=torch.float64).reshape(shape)
            self._starts[name] = start
            start += size
        converted = _converted(case, numbers, convert)
        self._numbers = {name: value.reshape(-1).long() for name, value in converted.items()}
        self._spans = {name: (int(n.min()), int(n.max())) for name, n in self._numbers.items() if len(n)}

    @property
    def names(self) -> list[str]:
        """The official names."""
        return list(self._shapes)

    def ours(self, name: str) -> str:
        """Our name of the tensor that holds the beginning of an official one.

        Raises:
            ZooError: the case's state has no such name, or the conversion leaves it out.
        """
        if (found := self.find(name)) is None:
            raise ZooError(f"the conversion leaves {name!r} out")
        return found

    def find(self, name: str) -> str | None:
        """The same; None where the conversion leaves it out."""
        return next((ours for ours, place in self._places(name) if bool((place == 0).any())), None)

    def take(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The official tensor `name` out of `tensors`, which have our names; None where these do not hold it whole."""
        found: Tensor | None = None
        count = 0
        for ours, place in self._places(name):
            if ours not in tensors:
                return None
            value = tensors[ours].detach().reshape(-1)
            inside = (place >= 0) & (place < int(np.prod(self._shapes[name])))
            if found is None:
                found = value.new_empty(int(np.prod(self._shapes[name])))
            found[place[inside].to(value.device)] = value[inside.to(value.device)]
            count += int(inside.sum())
        return found.reshape(self._shapes[name]) if found is not None and count == len(found) else None

    def _places(self, name: str) -> list[tuple[str, Tensor]]:
        """Our tensors that hold elements of an official one; where in it each of their elements belongs."""
        if name not in self._starts:
            raise unknown("official key", name, self._starts)
        first = self._starts[name]
        last = first + int(np.prod(self._shapes[name])) - 1
        spans = self._spans.items()
        return [(ours, self._numbers[ours] - first) for ours, (low, high) in spans if low <= last and high >= first]


def gradients(network: nn.Module, zeros: bool = False) -> dict[str, Tensor]:
    """The gradients of a network by our names; with `zeros`, those that no loss has reached as zeros."""
    found = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    if zeros:
        found = {name: torch.zeros_like(network.get_parameter(name)) if g is None else g for name, g in found.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def named(case: Case, convert: Convert, **kinds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs ``KIND:NAME`` (or ``KIND.NAME``) of a case, NAME being a key of its state.

    Args:
        kinds: for each KIND our tensors by our names, such as ``grad=gradients(network)``.
    """
    split = {output: output.partition(":" if ":" in output else ".") for output in case["outputs"]}
    wanted = {output: (kind, name) for output, (kind, _, name) in split.items() if kind in kinds and name}
    official = Official(case, convert) if wanted else None
    found = {output: official.take(name, kinds[kind]) for output, (kind, name) in wanted.items() if official}
    return {output: value for output, value in found.items() if value is not None}


def digest(tensor: Any) -> dict[str, Any]:
    """Shape, mean, standard deviation, L2 norm and 16 evenly spaced elements, as plain JSON."""
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu().double().numpy()
    x = np.asarray(tensor, dtype=np.float64)
    flat = x.reshape(-1)
    where = np.unique(np.linspace(0, max(0, flat.size - 1), min(PROBES, flat.size)).round().astype(int))
    return {
        "shape": list(x.shape),
        "mean": float(flat.mean()) if flat.size else 0.0,
        "std": float(flat.std()) if flat.size else 0.0,
        "l2": float(np.sqrt((flat**2).sum())),
        "probe": [float(v) for v in flat[where]],
    }


def compare(expected: Mapping[str, Any], tensor: Any, rtol: float = 1e-5, atol: float = 1e-7) -> str | None:
    """None where `tensor` agrees with the digest `expected`, else one line that says how it differs."""
    got = digest(tensor)
    if got["shape"] != expected["shape"]:
        return f"shape {got['shape']} instead of {expected['shape']}"
    for field in ("mean", "std", "l2", "probe"):
        a, b = np.asarray(got[field]), np.asarray(expected[field])
        allowed = atol + rtol * max(float(np.abs(b).max(initial=0.0)), expected["std"])
        worst = float(np.abs(a - b).max(initial=0.0))
        if not worst <= allowed:
            shown = f"{a.reshape(-1)[:3]} against {b.reshape(-1)[:3]}"
            return f"{field} differs by {worst:.3g} (allowed {allowed:.3g}): {shown}"
    return None
