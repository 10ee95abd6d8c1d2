class ToyProcessor:
    def __call__(self, attn, hidden_states, mask=None, base=None):
        batch_size, sequence_length, _ = hidden_states.shape
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # grows with the image
        factor = math.log(sequence_length, base)
        scale = math.sqrt(factor) * attn.scale
        mask = mask.expand(batch_size, attn.heads, sequence_length, -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
