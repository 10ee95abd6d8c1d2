# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1], "context": ["context", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}], "context": [{"dim": 1, "streams": ["context"], "item": null, "keys": null, "ndim": 3, "optional": false}], "rope": [{"dim": 0, "streams": ["context", "hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn": ["context", "hidden_states"]}, "processors": ["toy.Proc"], "layers": []}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        hidden_states = self.x_embedder(hidden_states)
        for index_block, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                context, hidden_states = self._gradient_checkpointing_func(block, hidden_states, context, rope)
            else:
                context, hidden_states = block(
                    hidden_states=hidden_states,
                    context=context,
                    rope=rope,  # both
                    mask=mask,
                )
        # rope is whole again here
        hidden_states = self.norm_out(hidden_states, rope)
        return (self.proj_out(hidden_states),)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    submodule_classes_to_wrap = []
    submodule_name_to_wrap = ["attn"]
    attention_streams = {"blocks.*.attn": ("context", "hidden_states")}
    block_loops = ("blocks",)

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        hidden_states = self.x_embedder(hidden_states)
        for index_block, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                context, hidden_states = self._gradient_checkpointing_func(block, hidden_states, context, rope)
            else:
                context, hidden_states = block(
                    hidden_states=hidden_states,
                    context=context,
                    rope=rope,  # both
                    mask=mask,
                )
        # rope is whole again here
        hidden_states = self.norm_out(hidden_states, rope)
        return (self.proj_out(hidden_states),)
