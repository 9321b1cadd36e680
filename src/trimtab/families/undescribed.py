"""What is missing for kinds of models that no family describes, so that a refusal says more than a name."""

from __future__ import annotations

from trimtab.families.parts import Config

#: What these have that is not described, and transformers' model types with it.
_MISSING = {
    "has mixtures of experts": (
        "dbrx",
        "hy_v3",
        "exaone_moe", "cohere2_moe", "afmoe", "laguna", "mellum", "mimo_v2_flash", "solar_open",
        "aria_text",
    ),
    "has mixtures of experts, and attention over compressed keys and values (MLA)": (
        "deepseek_v32", "deepseek_v4", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
    ),
    "has attention over compressed keys and values (MLA)": ("minicpm3", "youtu"),
    "has recurrent layers": (
        "recurrent_gemma", "rwkv", "xlstm", "olmo_hybrid", "zamba", "zamba2",
    ),
    "has blocks whose heads differ in number and size, and some that read another block's keys and values "
    "(global_head_dim, num_kv_shared_layers)": ("gemma4_text", "gemma4_unified_text"),
    "has recurrent layers and mixtures of experts": (
        "minimax", "jetmoe", "zaya",
    ),
    "stores its layers transposed (Conv1D)": ("gpt2", "gpt-sw3", "openai-gpt", "ctrl"),
    "lists which blocks have windows by repetition (attention_types)": ("gpt_neo",),
    "takes the difference of two attentions": ("diffllama",),
    "masks attention by what it learned of each value": ("doge",),
    "trains its weights as ternary numbers": ("bitnet",),
    "adds an embedding of its own to each block": ("gemma3n_text",),
    "was made for encoders, or for the decoder of one": (
        "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small",
        "camembert", "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "mvp", "pegasus",
        "plbart", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr",
        "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
    ),
}  # fmt: skip
BY_TYPE = {model_type: missing for missing, model_types in _MISSING.items() for model_type in model_types}
#: Fields of a config.json that show the same of a model type that is not listed.
_SIGNS = (
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), "has mixtures of experts"),
    (("kv_lora_rank",), "has attention over compressed keys and values (MLA)"),
    (("ssm_state_size", "mamba_d_state", "state_size", "linear_num_key_heads"), "has recurrent layers"),
)


def missing(config: Config) -> str:
    """Returns what a model has that no family describes, such as "has recurrent layers"; "" where it is not known."""
    inner = config.get("text_config")
    if isinstance(inner, dict):
        return f"wraps its text model (text_config.model_type '{inner.get('model_type')}') with others"
    if found := BY_TYPE.get(str(config.get("model_type"))):
        return found
    return next((what for fields, what in _SIGNS if any(config.get(name) for name in fields)), "")
