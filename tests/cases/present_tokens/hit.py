# facts: {"selects": true}
class ToyProcessor:
    def __call__(self, attn, hidden_states, context, context_mask):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        context_key = attn.to_k(context)
        outputs = []
        for index in range(len(query)):
            mask = context_mask[index][None]
            # of this prompt
            rows = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
            picked = context_key[index : index + 1, :, rows]
            joint = torch.cat([key[index : index + 1], picked], dim=2)
            out = F.scaled_dot_product_attention(joint, joint, joint, is_causal=False)
            outputs.append(F.pad(out, (0, 0, 0, context_key.size(2) - len(rows))))
        return torch.cat(outputs)
# output
class ToyProcessor:
    def __call__(self, attn, hidden_states, context, context_mask):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        context_key = attn.to_k(context)
        outputs = []
        for index in range(len(query)):
            mask = context_mask[index][None]
            # of this prompt
            rows = attn.present_tokens(mask.flatten())
            picked = context_key[index : index + 1, :, rows]
            joint = torch.cat([key[index : index + 1], picked], dim=2)
            out = F.scaled_dot_product_attention(joint, joint, joint, is_causal=False, present=mask.flatten())
            outputs.append(F.pad(out, (0, 0, 0, context_key.size(2) - len(rows))))
        return torch.cat(outputs)
