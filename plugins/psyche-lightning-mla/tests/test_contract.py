"""The model against the conformance kit."""

from __future__ import annotations

from typing import Any

from psyche_lightning_mla.plugin import build

from psyche_lightning.testing.models import Factory, ModelContract


class TestMla(ModelContract):
    def make_factory(self) -> Factory:
        return build

    def make_config(self) -> dict[str, Any]:
        return {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        }


class TestMlaWithExperts(TestMla):
    def make_config(self) -> dict[str, Any]:
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        return {**super().make_config(), **experts}
