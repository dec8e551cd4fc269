"""AsyncGRPO with a worker that returns prepared rollouts, no server, and FlashAttention in plain PyTorch."""

import queue
import types

import numpy as np
import torch
from tiny_trl import ARGS, STEPS, V, assert_equal_training, model, rows, tokenizer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

SAMPLES = 4  # per step


def varlen_attention(query, key, value, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=True, window_size=None):
    """Attention over [N, heads, D]; each segment of the queries ends where its keys end."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    out = []
    for i in range(len(cu_q) - 1):
        q, k, v = query[cu_q[i] : cu_q[i + 1]], key[cu_k[i] : cu_k[i + 1]], value[cu_k[i] : cu_k[i + 1]]
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        later = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v))
    return torch.cat(out)


class Worker:
    """Prepared rollouts: two answers to each prompt, with old log-probs near the policy's or far from them."""

    def __init__(self) -> None:
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        draw = np.random.default_rng(0)
        for i in range(SAMPLES * STEPS * 2):
            if i % 2 == 0:
                prompt = draw.integers(4, V, draw.integers(2, 5))
            ids = np.concatenate([prompt, draw.integers(4, V, draw.integers(3, 7))])
            mask = (np.arange(len(ids)) >= len(prompt)).astype(np.int64)
            old = (-np.abs(draw.normal(3.0, 1.0, len(ids)))).astype(np.float32) * mask
            self.rollout_buffer.put(
                RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=ids,
                    completion_mask=mask,
                    old_log_probs=old,
                    advantage=float(draw.normal()),
                    model_version=0,
                    group_id=i // 2,
                    metrics={"reward": float(i % 3)},
                )
            )

    def start(self) -> None:
        pass

    stop = start

    def update_model_version(self, model_version: int) -> None:
        pass

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("out of rollouts")


class NoTransfer:
    """Does not transfer weights."""

    def init_weight_transfer(self) -> None:
        pass

    pause = resume = destroy = init_weight_transfer

    def send_weights(self, iterator) -> None:
        for _ in iterator:
            pass


def test_async_grpo(tmp_path, monkeypatch):
    kernels = types.SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    monkeypatch.setattr(packing, "_flash_attn", lambda: kernels)
    # the trainer asks for a CUDA device
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *_: None)
    path = str(tmp_path / "model")
    model().save_pretrained(path)

    def make(dtype):
        args = dict(per_device_train_batch_size=SAMPLES, token_budget=-1, max_staleness=100, num_generations=2)
        config = AsyncGRPOConfig(output_dir=str(tmp_path), **ARGS | args)
        config.model_init_kwargs = {"dtype": dtype}
        return AsyncGRPOTrainer(
            path, None, config, rows("prompt"), tokenizer(), rollout_worker=Worker(), weight_transfer=NoTransfer()
        )

    assert_equal_training(make)
