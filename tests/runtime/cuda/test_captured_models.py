"""Transformers of diffusers in their own pipelines: captured calls against calls as they are.

Of each a tiny pipeline is called with two lengths of prompts, so that masks change from call to
call. On CPU captures are played; a captured call that waits for numbers fails there as on CUDA.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from porter.shrink import call_kwargs, make_pipeline
from porter.verify.floor import output_tensors
from tests.runtime.cuda.played import played_without_reads
from xfuser_runtime.cuda.graphs import CallReplayer, CapturedCall
from xfuser_runtime.distributed.runtime_state import RuntimeState
from xfuser_runtime.loader import load_upstream_class

STEPS = 6
#: Set of prompts and seed of each call.
CALLS = ((0, 0), (0, 1), (1, 2))
#: What diffusers warns of is the same with captures and without.
pytestmark = pytest.mark.filterwarnings("ignore")

#: Relative L2: some kernels add in no fixed order.
GATE = 1e-5
LOCK = Path(__file__).parents[3] / "generated" / "porter.lock"


def difference_when_captured(
    stock: Any, state: RuntimeState, capture: Any = None
) -> tuple[float, CallReplayer]:
    """Largest relative L2 of the pipeline's outputs to those without captures."""
    expected, count = _outputs(stock, lambda call, *args: call(*args))
    calls_in_a_step = max(1, count // (len(CALLS) * STEPS))
    replayer = CallReplayer(capture)
    seen = 0

    def replayed(call: Any, model: Any, args: Any, kwargs: Any) -> Any:
        nonlocal seen
        if seen % calls_in_a_step == 0:
            state.start_pass(step=0, patch=None)
        seen += 1
        state.enter_transformer_call()
        return replayer.call(lambda m, *a, **k: call(m, a, k), model, args, kwargs)

    found, _ = _outputs(stock, replayed)
    differences = [
        float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)
    ]
    return max(differences), replayer


def _outputs(stock: Any, run: Callable[..., Any]) -> tuple[list[torch.Tensor], int]:
    """What all calls return, and how often the transformer was called."""
    model, count = type(stock.transformer), 0
    forward = model.forward

    def call(self: Any, args: Any, kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return run(call, self, args, kwargs)

    found = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(model, "forward", counted)
        for text, seed in CALLS:
            torch.manual_seed(seed)
            kwargs = call_kwargs(stock, num_inference_steps=STEPS, text=text)
            generator = torch.Generator("cpu").manual_seed(seed)
            output = output_tensors(stock(**{**kwargs, "generator": generator}))
            found.append(torch.cat([x.float().cpu().flatten() for x in output]))
    return found, count


def tiny(name: str, device: str = "cpu") -> Any:
    stock: Any = make_pipeline(load_upstream_class(name)).to(device)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.mark.parametrize(
    ("name", "has_notes"),
    [
        ("PixArtAlphaPipeline", False),
        # It takes the list of its control states apart.
        ("HunyuanDiTControlNetPipeline", False),
        # Tokens that a mask marks, in every layer.
        ("MochiPipeline", True),
        # A mask of its prompt, a cache of keys and values, lists that it makes anew.
        ("QwenImage21Pipeline", True),
    ],
)
def test_on_cpu(state: RuntimeState, name: str, has_notes: bool) -> None:
    found, replayer = difference_when_captured(tiny(name), state, played_without_reads)
    assert found == 0 and replayer.replays > 2 * STEPS and replayer.reasons == []
    graphs = [x for variants in replayer._calls.values() for x in variants]
    notes = [x.notes for x in graphs if isinstance(x, CapturedCall)]
    assert any(x.entries for x in notes) == has_notes


#: What no graph can hold, by the file of the transformer.
NOT_CAPTURED = {
    # Tokens go to experts by what the network computes.
    "transformers/transformer_hidream_image.py",
    # Its attention mask is a function, which is compiled within the call.
    "transformers/transformer_anyflow_far.py",
}


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_on_a_gpu(state: RuntimeState) -> None:
    ports = json.loads(LOCK.read_text(encoding="utf-8"))["ports"]
    tried: set[str] = set()
    wrong = []
    for name, port in ports.items():
        files = [x for x in port["outputs"] if x.startswith("transformers/")]
        if not files or files[0] in tried:
            continue
        try:
            found, replayer = difference_when_captured(tiny(name, "cuda"), state)
        except Exception as error:
            # Another pipeline of the same transformer may run on a GPU as it is.
            print(f"{name}: not run, {error}")
            continue
        tried.add(files[0])
        print(f"{name}: {found:.1e}, {replayer.replays} replays, {replayer.reasons}")
        is_left_alone = files[0] in NOT_CAPTURED
        if found > GATE or bool(replayer.replays) == is_left_alone:
            wrong.append(name)
    assert not wrong and len(tried) > 40
