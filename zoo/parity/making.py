"""How a case is made from official code; the guide is what ``zoo parity --make`` prints."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zoo.errors import ZooError
from zoo.parity.cases import Case, compare, digest, fill, filled_inputs, filled_state

GUIDE = """\
How a parity case is made
=========================

A case says what an official implementation computes, in one small JSON file that holds no weights. Whoever can run the
official code makes it once; from then on anyone can hold any implementation against it.

The file
--------
  paper     the paper's name in the zoo, as in `zoo list`
  case      the case's own name, and that of the file: tests/parity/cases/PAPER/CASE.json
  official  {"repo": "owner/name", "commit": 40 hex digits, "entry": the function or class that was called}
  config    what it was called with, in plain JSON; an adapter reads sizes, names and settings from here, so put in
            whatever the official code was given, defaults that count included
  dtype     of the official run; float64 wherever it runs so
  state     {"key": {"shape": [...], "rule": "..."}}: every entry of the official state dict, by its official name
  inputs    the same for what goes in. Whatever the official code draws at random (noise, masks, permutations, dropped
            labels) is an input too: hand it in, or put it in place of the generator
  outputs   {"name": digest}
  notes     what was pinned and how, and what an implementer could get wrong

How a tensor is filled
----------------------
By its rule, from numpy.random.RandomState(crc32(NAME)); an input's NAME is "input:" and its name.
  normal           N(0, 1)
  fan_in           N(0, 1) / sqrt(product of shape[1:]): weights in torch's layout
  fan_in_last_out  N(0, 1) / sqrt(product of shape[:-1]): weights in flax's layout
  small            N(0, 1) / 10: biases, tokens, position embeddings
  one              1 + N(0, 1) / 10: scales of normalisation layers
  var              1/2 + |N(0, 1)| / 2: running variances
  uniform          U[0, 1)
  randint:A:B      whole numbers from A to B - 1
  zeros, ones      these
  values           those in the entry's "values"
  keep             left as the network made it: fixed tables, counters

A digest
--------
Shape, mean, standard deviation, L2 norm and 16 evenly spaced elements. Two agree where each differs by less than
1e-7 + 1e-5 * max(largest of the expected, its standard deviation); float32 is allowed a hundred times as much.

Names of outputs
----------------
Free, but for these, which `zoo.parity.named` and `zoo.parity.train` compute without further words: grad:KEY, param:KEY,
buffer:KEY, ema:KEY with a key of the state, in its official layout; and of runs loss, loss:PART, lr, lr_group_I,
weight_decay_per_group, grad_norm_before_clipping. A run's inputs are numbered NAME_0, NAME_1, ..., one for every
micro-batch, and its config has "train": {"iterations", "iters_per_epoch", "epochs", "batch_size", ...}.

Making one
----------
  zoo parity --make PAPER -o make_case.py

writes a script that makes a case of a toy network and runs as it stands. Put the official network, its inputs and its
call in the toy's place, and run it where the official code runs. `zoo.parity.make` fills, calls, and refuses outputs
that are not finite or that differ when the call is repeated, which is how a draw that was not pinned shows.

A case of a new kind wants a branch in tests/parity/adapters/PAPER.py, whose `run(case)` gives the outputs by name. It
calls the zoo's public code only, and reads everything from the case: what the case does not say is an error, never a
guess. `zoo.parity.load_filled` fills a network, `filled_inputs` gives the inputs, `named` our tensors by official
names; a run is `zoo.parity.train(case, task, convert_official, {"imgs": "image", ...})`. What papers of one official
code base share stands in tests/parity/adapters/shared. Then

  zoo parity PAPER

replays it; cases outside the package are found through ZOO_PARITY_CASES=FOLDER.
"""


def rule_for(name: str, shape: Sequence[int]) -> str:
    """The rule that suits an entry of a torch state dict by its name and shape."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return "keep"
    if leaf == "running_var":
        return "var"
    if leaf.endswith("weight") and len(shape) > 1:
        return "fan_in"
    return "one" if leaf in ("weight", "scale", "gamma") and len(shape) == 1 else "small"


def make(
    paper: str,
    case: str,
    official: Mapping[str, str],
    compute: Callable[[dict[str, Tensor], dict[str, Tensor]], Mapping[str, Any]],
    *,
    state: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    rules: Mapping[str, str] | None = None,
    dtype: str = "float64",
    notes: str = "",
    folder: str | os.PathLike[str] | None = None,
) -> Case:
    """Makes a case from official code, and writes it.

    Args:
        paper: the paper's name in the zoo.
        case: the case's name.
        official: "repo", "commit" (40 hex digits) and "entry".
        compute: gets the filled state dict, without what is kept, and the filled inputs; loads, calls the official code
            and gives its outputs by name (tensors, arrays or numbers).
        state: the official state dict, or the shape of each of its entries.
        inputs: of each the shape and the rule, or an array of its values.
        config: what the official code was called with, in plain JSON.
        rules: for entries of the state that :func:`rule_for` does not suit; by name, or by a pattern that a whole name
            matches.
        dtype: of the run.
        notes: what was pinned, and how.
        folder: where ``<paper>/<case>.json`` is written; None: nowhere.

    Returns:
        The case.

    Raises:
        ZooError: no commit, a rule for no entry, an output that is not finite or differs in a second call.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", official.get("commit", "")) or not {"repo", "entry"} <= official.keys():
        raise ZooError(f"official wants repo, entry and commit, 40 hex digits; it is {dict(official)}")
    shapes = {key: tuple(getattr(value, "shape", value)) for key, value in (state or {}).items()}
    ruled = {key: _ruled(key, rules or {}) or rule_for(key, shape) for key, shape in shapes.items()}
    if idle := [name for name in rules or {} if not any(re.fullmatch(name, key) or name == key for key in shapes)]:
        raise ZooError(f"a rule for no entry of the state: {idle[0]!r}")
    made: Case = {
        "paper": paper,
        "case": case,
        "official": dict(official),
        "config": json.loads(json.dumps(config or {})),
        "dtype": dtype,
        "state": {key: {"shape": list(shape), "rule": ruled[key]} for key, shape in shapes.items()},
        "inputs": {name: _entry(name, spec) for name, spec in (inputs or {}).items()},
    }
    for name, entry in {**made["state"], **made["inputs"]}.items():
        fill(name, entry)  # an unknown rule is told before anything is computed
    first, second = (dict(compute(filled_state(made), filled_inputs(made))) for _ in range(2))
    made["outputs"] = {name: digest(value) for name, value in first.items()}
    if not made["outputs"]:
        raise ZooError("compute gave no outputs")
    for name, expected in made["outputs"].items():
        if not np.isfinite([expected["l2"], *expected["probe"]]).all():
            raise ZooError(f"output {name!r} is not finite")
        if name not in second or compare(expected, second[name]):
            raise ZooError(f"output {name!r} differs in a second call: a random draw is no input yet")
    made["notes"] = notes
    if folder is not None:
        path = Path(folder) / paper / f"{case}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made, separators=(",", ":")) + "\n")
    return made


def _ruled(key: str, rules: Mapping[str, str]) -> str | None:
    return rules.get(key) or next((rule for name, rule in rules.items() if re.fullmatch(name, key)), None)


def _entry(name: str, spec: Any) -> dict[str, Any]:
    """An input's entry: of a shape and a rule, or of values."""
    if isinstance(spec, Mapping):
        return dict(spec)
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], str):
        return {"shape": list(spec[0]), "rule": spec[1]}
    values = spec.detach().cpu().numpy() if isinstance(spec, Tensor) else np.asarray(spec)
    if values.dtype.kind not in "iufb":
        raise ZooError(f"input {name!r} is neither (shape, rule) nor numbers")
    return {"shape": list(values.shape), "rule": "values", "values": values.tolist()}


def template(paper: str) -> str:
    """A script that makes a case of `paper`; runs as it stands, on a toy network.

    Raises:
        ZooError: no name that a paper could have.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", paper):
        raise ZooError(f"a paper's name has small letters, digits and underscores only, not {paper!r}")
    return _TEMPLATE.replace("PAPER", paper)


_TEMPLATE = '''\
"""Makes a parity case of PAPER: python make_case.py [FOLDER]

As it stands it makes one of a toy network. Put the official network, inputs and call where the comments say so, and run
it where the official code runs. `zoo parity --make` explains the format.
"""

import sys

from torch import nn

from zoo import parity

# 1. The official network, small: every option that matters switched on, every size another number.
CONFIG = {"in_features": 6, "hidden": 5, "classes": 3}


def network():
    return nn.Sequential(
        nn.Linear(CONFIG["in_features"], CONFIG["hidden"]), nn.GELU(), nn.Linear(CONFIG["hidden"], CONFIG["classes"])
    )


# 2. The call. Whatever it draws at random is handed in as an input, or put in place of the generator.
def compute(state, inputs):
    net = network().double()
    net.load_state_dict(state, strict=False)  # what the case keeps is not in `state`
    logits = net(inputs["x"])
    loss = nn.functional.cross_entropy(logits, inputs["labels"])
    loss.backward()
    gradients = {f"grad:{name}": p.grad for name, p in net.named_parameters()}
    return {"logits": logits, "loss": loss, **gradients}


if __name__ == "__main__":
    made = parity.make(
        paper="PAPER",
        case="toy",
        # 3. Where the official code is from.
        official={"repo": "owner/name", "commit": "0" * 40, "entry": "module.Class"},
        compute=compute,
        state=network().state_dict(),
        inputs={"x": ([4, CONFIG["in_features"]], "normal"), "labels": ([4], f"randint:0:{CONFIG['classes']}")},
        config=CONFIG,
        notes="What was pinned, and how; what an implementer could get wrong.",
        folder=sys.argv[1] if len(sys.argv) > 1 else "cases",
    )
    print(f"{made['paper']}/{made['case']}: {len(made['outputs'])} outputs")
'''
