"""Convert models of other libraries at tiny configurations and check them in numbers.

    python benchmarks/zoo_others.py [--only 'zuko:*'] [--again] [--minutes 60] [--render] [--choose]

Which models is fixed by a rule (`zoo_libraries/rule.py`) and written to `zoo_libraries/list.json`
before anything runs; models chosen by hand are counted apart. Every model is checked in a process
of its own, with a limit on time and memory; a second run goes on where the first one ended and
checks again what failed. No weights are loaded and nothing is downloaded. The result file has one
line of JSON a model; from it comes the table in `docs/zoo.md`.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import zoo
import zoo_table
from zoo_libraries import rule
from zoo_libraries.entries import ENTRIES, Entry
from zoo_others_table import RESULT, read
from zoo_process import Job, Row, said

from bayesify.provenance import provenance
from bayesify.storage import replacing

LIMIT_S = 600
MEMORY = 10 * 2**30
MODULES = ("huggingface", "sequences", "vision", "generative", "graphs", "flows", "decisions")
"""The adapters; importing them imports none of their libraries but transformers."""


def entries() -> dict[str, Entry]:
    for module in MODULES:
        importlib.import_module(f"zoo_libraries.{module}")
    return ENTRIES


def names() -> list[str]:
    """The rule's list, then what was chosen by hand."""
    listed = rule.keys()
    return listed + [key for key in entries() if key not in set(listed)]


def write(rows: dict[str, Row]) -> None:
    with replacing(RESULT, overwrite=True) as path:
        path.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))


# -- one model -------------------------------------------------------------------------------


def work(key: str) -> Row:
    """Check one model, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging = importlib.import_module("transformers").logging
    logging.set_verbosity_error()
    return check(entries()[key])


def built(entry: Entry) -> Any:
    import torch

    torch.manual_seed(0)
    return entry.make()


def check(entry: Entry) -> Row:
    """What held of a model, and what did not.

    The problems are those of ``tests/reference.py``'s check (values at the means, drawn values and
    gradients against ``torch.func.functional_call``, back-conversion) and of a state dict and a
    file into a fresh model. A model that does not run by itself is no finding: its problem says so.
    """
    import torch
    import zoo_checks  # puts the tests' reference on the path

    import bayesify
    from reference import check as numeric
    from reference import perturb_

    model, call = built(entry)
    try:
        for training in (False, True):
            model.train(training)
            args, kwargs = call(entry.batches[0])
            model(*args, **kwargs)
    except Exception as error:
        return {"problems": [f"the original itself: {said(error)}"], "own_fault": True}
    model, call = built(entry)
    found: Row = {"parameters": sum(p.numel() for p in model.parameters())}
    report = numeric(model, call, batches=entry.batches, prepare=entry.prepare)

    model, call = built(entry)
    perturb_(model)
    if entry.prepare is not None:
        entry.prepare(model)
    converted = bayesify.to_bbb(model)
    found["tensors"] = sum(1 for _ in bayesify.posteriors(converted))
    args, kwargs = call(entry.batches[0])
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad(), bayesify.one_draw(converted.eval(), seed=1):
            converted(*args, **kwargs)
        times.append(time.perf_counter() - start)
    found["first_call_s"], found["second_call_s"] = (round(t, 3) for t in times)
    with bayesify.one_draw(converted.train(), seed=1):
        converted(*args, **kwargs)
    owners: dict[str, bool] = {}
    for rung in bayesify.rungs(converted):
        owners[rung.owner] = owners.get(rung.owner, False) or rung.rung == "swap"
    census = zoo_checks.census(converted)
    found |= {"all_owners": len(owners), "all_swapped": sum(owners.values()), **census}
    return found | {"problems": zoo_checks._few(report.problems + stored(entry, converted, call))}


def stored(entry: Entry, converted: Any, call: Any) -> list[str]:
    """What is wrong with a state dict, and with a file, that go into a model built anew."""
    import torch

    import bayesify
    from reference import same, seed_all, values

    problems = []
    converted.eval()
    state = {k: v.clone() for k, v in converted.state_dict().items() if torch.is_tensor(v)}
    missing = [name for name, *_ in bayesify.posteriors(converted) if name not in state]
    problems += [f"state dict: no {name}" for name in missing[:2]]

    def drawn(model: Any) -> Any:
        args, kwargs = call(entry.batches[0])
        seed_all(7)
        with torch.no_grad(), bayesify.one_draw(model.eval(), seed=3):
            return values(model(*args, **kwargs))

    expected = drawn(converted)
    converted.load_state_dict(state, strict=False)  # statistics that the call has moved
    fresh = bayesify.to_bbb(built(entry)[0])
    fresh.load_state_dict(converted.state_dict())
    if not same(drawn(fresh), expected):
        problems.append("state dict: another draw in a fresh model")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bbb.safetensors"
        try:
            bayesify.save(converted, path)
            # a copy, as what was converted: a copied GraphModule has more entries
            back = bayesify.load(path, model=copy.deepcopy(built(entry)[0]))
        except bayesify.BayesifyError as error:
            return [*problems, f"file: {said(error)}"]
    for key, value in state.items():
        if not torch.equal(back.state_dict()[key], value):
            problems.append(f"file: {key} differs")
    if not same(drawn(back), expected):
        problems.append("file: another draw in a fresh model")
    return problems


# -- all of them -----------------------------------------------------------------------------


def run(only: str, again: bool, minutes: float) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server's own path lacks this folder
    multiprocessing.set_forkserver_preload(["zoo_libraries.warm"])
    rows = read()
    listed = set(rule.keys())
    stop = time.monotonic() + 60 * minutes
    source = provenance("torch", "transformers")
    queue = [n for n in names() if fnmatch.fnmatchcase(n, only)]
    if not again:
        queue = [n for n in queue if rows.get(n, {"problems": ["not run"]})["problems"]]
        # the slow ones come last, what never ran before what failed
        queue.sort(key=lambda n: (n.startswith(("torchvision", "transformers")), n in rows))
    for number, name in enumerate(queue, 1):
        if time.monotonic() > stop:
            print(f"{len(queue) - number + 1} more to do", flush=True)
            break
        job = Job(name, work, (name,), LIMIT_S)
        while (found := job.result()) is None:
            wait([job.pipe], timeout=1.0)
        rows[name] = {"name": name, "by_hand": name not in listed} | found | source
        known = set(names())
        rows = {n: r for n, r in (read() | {name: rows[name]}).items() if n in known}
        write(rows)
        said_ = "; ".join(found["problems"][:2]) or "ok"
        print(f"{number}/{len(queue)} {name}: {said_} ({found.get('seconds')} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", help="glob of model names")
    parser.add_argument("--again", action="store_true", help="also what passed already")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing later")
    parser.add_argument("--choose", action="store_true", help="only write the list anew")
    parser.add_argument("--render", action="store_true", help="only write the table")
    options = parser.parse_args()
    if options.choose:
        rule.LIST.write_text(json.dumps(rule.choose(), indent=1) + "\n")
        return
    if not options.render:
        run(options.only, options.again, options.minutes)
    zoo_table.render(zoo.read())


if __name__ == "__main__":
    main()
