"""The command that runs a port: `torchrun --nproc_per_node=N -m xfuser_runtime.run NAME ...`.

Everything that can be checked without other ranks is checked first, so that a wrong call
ends in one line before any collective.  Without torchrun it is one process.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xfuser_runtime.args import xFuserArgs
from xfuser_runtime.config import EngineConfig, InputConfig, world_size_of_environment
from xfuser_runtime.errors import (
    ConfigError,
    InputError,
    NotSupportedError,
    XFuserError,
)

_DTYPES = ("float32", "bfloat16", "float16")
#: Seconds that other ranks of a host leave the first one to say what is wrong with all.
_GRACE = 20.0

_DESCRIPTION = """\
Run a port that `porter add-model` made, on one process or on all ranks of torchrun.
The picture is saved by the last rank of each data-parallel replica."""

_EXAMPLES = """\
examples (NAME is a pipeline of diffusers):
  one process, through the port:
    python -m xfuser_runtime.run NAME --model DIR --prompt "a red fox"
  two processes, one for each branch of classifier-free guidance:
    torchrun --nproc_per_node=2 -m xfuser_runtime.run NAME \\
        --model DIR --prompt "a red fox" --use_cfg_parallel
  four, guidance branches times two shards of the sequence:
    torchrun --nproc_per_node=4 -m xfuser_runtime.run NAME \\
        --model DIR --prompt "a red fox" --use_cfg_parallel --ulysses_degree 2
  two stages with PipeFusion:
    torchrun --nproc_per_node=2 -m xfuser_runtime.run NAME \\
        --model DIR --prompt "a red fox" --pipefusion_parallel_degree 2
  diffusers' own class, and how far another picture is from its:
    python -m xfuser_runtime.run NAME --stock \\
        --model DIR --prompt "a red fox" --output stock.png
    torchrun ... --output fox.png --reference stock.png

exit codes: 0 done; 1 refused (an unproven mode, a flag without an implementation, a
stale or hand-edited port) or a failure during the run; 2 wrong input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except Exception as error:
        return _tell(error, with_traceback=args.traceback)


def build_parser() -> argparse.ArgumentParser:
    """The parser: our own flags, then those of `xFuserArgs`."""
    parser = argparse.ArgumentParser(
        prog="python -m xfuser_runtime.run",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "name", metavar="NAME", help="pipeline class, as given to porter"
    )
    parser.add_argument(
        "--generated",
        default="generated",
        metavar="DIR",
        help="folder of the ports and porter.lock (default: generated)",
    )
    parser.add_argument(
        "--stock",
        action="store_true",
        help="run diffusers' own class instead of the port, on one process",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the weights (default: float32 on CPU, bfloat16 on CUDA)",
    )
    parser.add_argument(
        "--no_use_resolution_binning",
        action="store_true",
        help="keep height and width as given, in pipelines that round them to a bin",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that defines components of the checkpoint; may be repeated",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path("image.png"),
        metavar="FILE",
        help="the picture (default: image.png); several are numbered",
    )
    output.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="print how far the picture is from this one",
    )
    output.add_argument(
        "--json", action="store_true", help="print the report as one JSON object"
    )
    output.add_argument(
        "--report_memory",
        "--report-memory",
        action="store_true",
        help="print what each rank holds: weights by component, resident, peak",
    )
    output.add_argument(
        "--traceback", action="store_true", help="show tracebacks of errors"
    )
    return xFuserArgs.add_cli_args(parser)


def check_checkpoint(folder: str | None, class_name: str) -> Path:
    """The checkpoint folder, if it holds a pipeline of this class.

    Raises:
        InputError: there is no such folder, it is no checkpoint, or of another class.
    """
    if folder is None:
        raise InputError(
            "no checkpoint folder, expected --model DIR; "
            f"`porter make-checkpoint {class_name} DIR` makes a tiny one"
        )
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"{folder}: no model_index.json, expected a folder that diffusers' "
            "save_pretrained wrote; check --model"
        )
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{index}: no _class_name, expected the index that diffusers writes; "
            "save the pipeline again"
        ) from None
    if found != class_name:
        raise InputError(
            f"{folder}: a checkpoint of {found}, expected {class_name}; "
            "name the pipeline of the checkpoint or pass another --model"
        )
    return Path(folder)


def _import_modules(names: Sequence[str]) -> None:
    """Import modules that upstream's loader takes components from.

    Raises:
        InputError: there is no such module.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"--import {name}: {error}, expected a module on the Python path"
            ) from None


def _run(args: argparse.Namespace) -> int:
    if args.stock and world_size_of_environment() != 1:
        raise ConfigError(
            f"--stock on {world_size_of_environment()} processes, expected 1; "
            "start it with python, not torchrun"
        )
    engine_config, input_config = xFuserArgs.from_cli_args(args).create_config()
    _check_inputs(args, input_config)
    # Not before the flags are checked: these imports take seconds.
    from xfuser_runtime import session
    from xfuser_runtime.attention import check_backend_name
    from xfuser_runtime.base_wrapper import upstream_class
    from xfuser_runtime.loader import load_pipeline_class, load_upstream_class

    check_backend_name(engine_config.runtime_config.attention_backend)
    _import_modules(args.imports)
    cls: Any
    if args.stock:
        cls = load_upstream_class(args.name)
        folder = check_checkpoint(args.model, cls.__name__)
    else:
        cls = load_pipeline_class(args.name, generated=args.generated)
        folder = check_checkpoint(args.model, upstream_class(cls).__name__)
        _check_proven(cls, engine_config)
    arguments = call_arguments(cls, args, input_config)
    with session.open_session(
        cls,
        folder,
        engine_config,
        stock=args.stock,
        dtype=args.dtype,
        tracebacks=args.traceback,
    ) as running:
        output = running.call(arguments)
        if output is not None:
            stream = sys.stderr if args.json else sys.stdout
            session.save(output, args.output, args.reference, stream)
        report = running.report(
            cls.__name__,
            input_config.num_inference_steps,
            with_memory=args.report_memory,
        )
        if running.rank == 0:
            print(json.dumps(asdict(report)) if args.json else report.lines())
    return 0


def _check_proven(cls: Any, engine_config: EngineConfig) -> None:
    """As wrapping does later, but before any collective; a warning is said once."""
    from xfuser_runtime.proofs import UnprovenWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnprovenWarning)
        cls.check_proven(engine_config)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for warning in caught:
            print(f"warning: {warning.message}", file=sys.stderr, flush=True)
    warnings.simplefilter("ignore", UnprovenWarning)


def _check_inputs(args: argparse.Namespace, input_config: InputConfig) -> None:
    if not input_config.prompt:
        raise InputError('no prompt, expected one; pass --prompt "..."')
    if args.reference is not None and not args.reference.is_file():
        raise InputError(
            f"{args.reference}: no such file, expected a picture; check --reference"
        )


def call_arguments(
    cls: type, args: argparse.Namespace, input_config: InputConfig
) -> dict[str, Any]:
    """Keyword arguments of the pipeline call: the inputs that were given.

    Raises:
        InputError: the pipeline has no parameter for one of them.
    """
    import torch

    given = asdict(input_config)
    del given["batch_size"]
    given["generator"] = torch.Generator("cpu").manual_seed(given.pop("seed"))
    given["use_resolution_binning"] = False if args.no_use_resolution_binning else None
    for name in ("prompt", "negative_prompt"):
        given[name] = (
            list(given[name]) if isinstance(given[name], tuple) else given[name]
        )
    given = {name: value for name, value in given.items() if value is not None}
    known = inspect.signature(cls.__call__).parameters
    unknown = [name for name in given if name not in known]
    unknown = [n for n in unknown if (n, given[n]) != ("num_images_per_prompt", 1)]
    if unknown:
        raise InputError(
            f"{cls.__name__} has no parameter {unknown[0]}, expected flags "
            f"that it takes; leave out --{unknown[0]}"
        )
    return {name: value for name, value in given.items() if name in known}


def _tell(error: Exception, *, with_traceback: bool) -> int:
    """Print one line and return the exit code.

    Ranks of one host mostly fail alike: the first one speaks at once, and torchrun ends
    the others within their grace, so that the line stands there once.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank:
        time.sleep(_GRACE)
    if with_traceback:
        traceback.print_exception(error)
    known = isinstance(error, (XFuserError, OSError))
    text = " ".join(str(error).split())
    where = f"rank {os.environ['RANK']}: " if local_rank else ""
    kind = "" if known else f"{type(error).__name__}: "
    hint = "" if known or with_traceback else "; pass --traceback to see where"
    print(f"error: {where}{kind}{text}{hint}", file=sys.stderr, flush=True)
    return 1 if isinstance(error, NotSupportedError) else 2


if __name__ == "__main__":
    sys.exit(main())
