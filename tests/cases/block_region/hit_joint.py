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

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        hidden_states = self.x_embedder(hidden_states)
        region = self._begin_region(
            "blocks", {"hidden_states": hidden_states.shape[1], "context": context.shape[1]}, latents="hidden_states"
        )
        hidden_states = region.shard(hidden_states, 1, "hidden_states")
        context = region.shard(context, 1, "context")
        local_rope = region.shard(rope, 0, "context", "hidden_states")
        for index_block, block in enumerate(self.blocks):
            context, hidden_states = region.hand_over(context, hidden_states)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                context, hidden_states = self._gradient_checkpointing_func(block, hidden_states, context, rope)
            else:
                context, hidden_states = block(
                    hidden_states=hidden_states,
                    context=context,
                    rope=local_rope,  # both
                    mask=mask,
                )
        context = region.gather(context, 1, "context")
        hidden_states = region.gather(hidden_states, 1, "hidden_states")
        # rope is whole again here
        hidden_states = self.norm_out(hidden_states, rope)
        return (self.proj_out(hidden_states),)
