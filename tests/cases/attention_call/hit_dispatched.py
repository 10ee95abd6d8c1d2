class ToyProcessor:
    def __call__(self, attn, hidden_states, context=None, mask=None):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        hidden_states = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        return attn.to_out[0](hidden_states)
# output
class ToyProcessor:
    def __call__(self, attn, hidden_states, context=None, mask=None):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        hidden_states = attn.dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        return attn.to_out[0](hidden_states)
