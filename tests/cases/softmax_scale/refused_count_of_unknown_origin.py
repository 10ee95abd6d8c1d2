# facts: {"scales": true}
# error: 0 matches
class ToyProcessor:
    def __call__(self, attn, hidden_states):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        scale = math.log(hidden_states.size(1)) * attn.scale
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
