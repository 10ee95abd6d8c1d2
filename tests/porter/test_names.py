"""Where the names of a generated file come from."""

from __future__ import annotations

import pytest

from porter.errors import Refusal
from porter.names import bindings, free_names, local_names, output_path, wrapper_name
from porter.parsed import ParsedModule

MODULE = """
import numpy as np
from typing import Any
from .sibling import helper
if helper():
    import extra as xm
    FLAG = True
else:
    FLAG = False
try:
    import fast
except ImportError:
    fast = None
def function(): ...
class Thing: ...
"""


@pytest.mark.parametrize(
    ("kind", "name", "wrapper"),
    [
        ("pipeline", "PixArtAlphaPipeline", "xFuserPixArtAlphaPipeline"),
        ("transformer", "PixArtTransformer2DModel", "xFuserPixArtTransformer2DWrapper"),
        ("attention", "AttnProcessor2_0", "xFuserAttnProcessor2_0Wrapper"),
    ],
)
def test_wrapper_names_are_the_manuals(kind: str, name: str, wrapper: str) -> None:
    assert wrapper_name(kind, name) == wrapper


def test_output_path_keeps_upstreams_file_name() -> None:
    module = ParsedModule("package.sub.pipeline_x", "package/sub/pipeline_x.py", "")
    assert output_path("pipeline", module) == "pipelines/pipeline_x.py"


def test_bindings_tell_other_packages_and_what_may_be_missing() -> None:
    found = bindings(ParsedModule("m", "m.py", MODULE))
    assert found["np"].external == "import numpy as np"
    assert found["Any"].external == "from typing import Any"
    assert {n for n, b in found.items() if not b.always} == {"xm"}
    assert not found["helper"].external


def test_free_names_cover_decorators_defaults_annotations_and_nested_scopes() -> None:
    method = (
        "    @decorator\n"
        "    def f(self, a: Hint = default) -> Result:\n"
        "        b = [used(c) for c in a]\n"
        "        return len(b) + self.d + other\n"
    )
    assert free_names(method, "A") == {
        "decorator",
        "Hint",
        "default",
        "Result",
        "used",
        "other",
    }
    assert local_names(method) >= {"self", "a", "b"}


def test_a_body_that_needs_its_own_class_is_refused() -> None:
    with pytest.raises(Refusal, match="super"):
        free_names("    def f(self):\n        return super().f()\n", "A")
