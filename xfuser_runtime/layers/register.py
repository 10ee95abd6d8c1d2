"""Which wrapper stands for which layer and which attention processor (manual, section 4)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from xfuser_runtime.base_wrapper import swap_class
from xfuser_runtime.register import WrapperRegister


class xFuserLayerWrappersRegister(WrapperRegister):
    """Maps a layer class to its wrapper."""

    kind = "Layer"


class xFuserAttentionProcessorRegister(WrapperRegister):
    """Maps an attention processor class to its port.

    A port is a subclass of the processor whose `__call__` hands its attention calls to the
    module: `attn.scaled_dot_product_attention(...)`, `attn.dispatch_attention_fn(...)`.
    """

    kind = "Attention Processor class"

    @classmethod
    def is_ported(cls, processor: Any) -> bool:
        """Whether it is in its ported form already."""
        return type(processor) in cls._wrappers.values()

    @classmethod
    def convert(cls, processor: Any) -> Any:
        """The ported form of a processor.

        A processor with weights is re-classed in place, so that its parameters stay the
        ones that others hold; any other is copied, since one instance may be set on
        modules that are not wrapped.

        Raises:
            ValueError: the class of the processor is not ported (the manual's message).
        """
        if cls.is_ported(processor):
            return processor
        wrapper = cls.get_class(type(processor))
        ported = processor if isinstance(processor, nn.Module) else copy.copy(processor)
        swap_class(ported, wrapper)
        return ported
