"""DPO in one file, from top to bottom: model, data, labels, reference, loss, optimizer.

python examples/minimal_dpo.py                              # a tiny Llama, offline, a few seconds on a CPU
python examples/minimal_dpo.py HuggingFaceTB/SmolLM2-135M   # a Hub id or a folder
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import fused_po
from fused_po.integrations.lm_head import head_input, lm_head

# 1. The policy. Without an argument it is a Llama with random weights, and each byte of a text is a token.
torch.manual_seed(0)
if len(sys.argv) > 1:
    policy = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=False)
    tokenizer, lr = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False), 1e-5
else:
    tokenizer, lr = ByT5Tokenizer(), 3e-4
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))

# 2. Preference data: prompt, chosen answer (polite), rejected answer (rude). The last three pairs are held out.
PAIRS = [
    ("What is the capital of France?", " It is Paris. Glad to help!", " Paris. Look it up yourself."),
    ("Which planet is the largest?", " That is Jupiter. Happy to help!", " Jupiter. Everybody knows that."),
    ("What is 7 times 6?", " It is 42. You are welcome!", " 42. Stop asking me."),
    ("Who wrote Hamlet?", " It was Shakespeare. Happy to help!", " Shakespeare. Read a book."),
    ("What do bees make?", " They make honey. You are welcome!", " Honey. Everybody knows that."),
    ("Where is Mount Fuji?", " It is in Japan. Glad to help!", " Japan. Look it up yourself."),
    ("Which metal is liquid?", " That is mercury. Glad to help!", " Mercury. Look it up yourself."),
    ("How many legs has a spider?", " It has eight. You are welcome!", " Eight. Stop asking me."),
    ("Who painted the Mona Lisa?", " It was Leonardo. Happy to help!", " Leonardo. Read a book."),
]


def batch_of(pairs):
    """(input_ids and attention_mask, labels), each [2B, T]: B chosen answers with their prompts, then B rejected."""
    prompts = [tokenizer(pair[0], add_special_tokens=False).input_ids for pair in pairs] * 2
    texts = [pair[1] for pair in pairs] + [pair[2] for pair in pairs]
    answers = [tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for text in texts]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers))
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)  # -100: ignored by the loss
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        mask[row, : len(prompt) + len(answer)] = 1
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)  # prompts and padding stay -100
    return {"input_ids": ids, "attention_mask": mask}, fused_po.shift_labels(labels)  # aligned: t predicts token t + 1


def dpo(inputs, labels, ref_logps):
    """The DPO loss. lm_head(policy) has what the head does to hidden states: weight, bias, logit_scale, softcap."""
    hidden = head_input(policy, **inputs).hidden  # [2B, T, H]; what goes into the head
    return fused_po.linear_dpo(hidden, labels=labels, ref_logps=ref_logps, beta=0.1, **lm_head(policy)._asdict())


# 3. The reference is a frozen copy of the policy. Its log-probs [2B, T] are computed once.
reference = copy.deepcopy(policy).requires_grad_(False)
batches = []
for inputs, labels in (batch_of(PAIRS[:-3]), batch_of(PAIRS[-3:])):
    hidden = head_input(reference, **inputs).hidden
    batches.append((inputs, labels, fused_po.linear_logps(hidden, labels=labels, **lm_head(reference)._asdict()).logps))

# 4. Training. At step 0 policy and reference are equal: all margins are 0, and the loss is log 2.
optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
for step in range(31):
    out = dpo(*batches[0])
    if step % 5 == 0:
        with torch.no_grad():
            test = dpo(*batches[1])
        print(f"step {step:2}  loss {out.loss:.4f}  margin {out.margins.mean():6.3f}", end="  ")
        print(f"accuracy {out.accuracy.mean():.2f}  held-out margin {test.margins.mean():6.3f}", end="  ")
        print(f"accuracy {test.accuracy.mean():.2f}")
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
