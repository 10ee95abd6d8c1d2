class ToyProcessor:
    def __call__(self, attn, hidden_states, context=None, mask=None):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # over all tokens
        hidden_states = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        return attn.to_out[0](hidden_states)
# output
class ToyProcessor:
    def __call__(self, attn, hidden_states, context=None, mask=None):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # over all tokens
        hidden_states = attn.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        return attn.to_out[0](hidden_states)
