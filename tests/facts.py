"""Facts of models by their published shapes, and targets with room, for tests that compute nothing."""

from trimtab.model.facts import Linear, ModelFacts
from trimtab.model.hardware import GB, Hardware, target


def llama(layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, positions, tied) -> ModelFacts:
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    names = [(f"model.layers.{n}.{name}", shape) for n in range(layers) for name, shape in shapes.items()]
    linears = tuple(Linear(name, *shape) for name, shape in names)
    parameters = sum(layer.parameters for layer in linears)
    parameters += (1 if tied else 2) * vocab * hidden + (2 * layers + 1) * hidden
    return ModelFacts(
        architecture="LlamaForCausalLM", model_type="llama", layers=layers, hidden_size=hidden,
        intermediate_size=intermediate, heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocab_size=vocab,
        max_position_embeddings=positions, tied_embeddings=tied, parameters=parameters, bytes=2 * parameters,
        dtype="bfloat16", linears=linears, head_numbers=2 * head_dim,
    )  # fmt: skip


SMOLLM2 = llama(30, 576, 1536, 9, 3, 64, 49152, 8192, True)
LLAMA_1B = llama(16, 2048, 8192, 32, 8, 64, 128256, 131072, True)
LLAMA_3B = llama(28, 3072, 8192, 24, 8, 128, 128256, 131072, True)
LLAMA_8B = llama(32, 4096, 14336, 32, 8, 128, 128256, 131072, False)
LLAMA_70B = llama(80, 8192, 28672, 64, 8, 128, 128256, 131072, False)
MODELS = {"SmolLM2-135M": SMOLLM2, "Llama-3.1-8B": LLAMA_8B, "Llama-3.1-70B": LLAMA_70B}


def on(name: str, memory_gb: int = 1000) -> Hardware:
    return target(name, memory_gb * GB if name == "cpu" else None)
