"""What servers read: each file is parsed by the parser of its own format."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from trimtab.base.errors import InputError
from trimtab.catalog.contracts.arguments import llm_args
from trimtab.pipelines.commands import main
from trimtab.recipe import Recipe
from trimtab.serving import artifact
from trimtab.serving.triton import engine_parameters
from trimtab.serving.write import write
from trimtab.store import open_store

LEGACY = ("engine: {backend: trtllm-legacy, tensor_parallel_size: 2, max_batch_size: 32, kv_cache_fraction: 0.85, "
          "enable_chunked_prefill: true, enable_block_reuse: false, scheduler_policy: max_utilization}")  # fmt: skip


def export(folder, algorithm: str | None = "FP8", kv_cache: str | None = "FP8"):
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"]}
    if algorithm or kv_cache:
        config["quantization_config"] = {"quant_method": "modelopt"}
        own = {"quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": kv_cache}}
        (folder / "hf_quant_config.json").write_text(json.dumps(own))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def released(tmp_path):
    """A function: a recipe's engine -> the URI of a release."""

    def make(recipe: str, built: list[str] = ()) -> str:
        store = open_store(str(tmp_path / "store"))
        for path in ("engine.json", *built):
            (tmp_path / "built" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "built" / path).write_text("{}")
        tree, engine = store.put_json("export", {"an": "export"}), store.put(tmp_path / "built", kind="engine")
        verdict = {"outcome": "accepted", "reason": "recovery 0.99 (0.97 to 1.01) is at least 0.95"}
        return store.release("Smol_LM", {
            "artifact": tree.model_dump(), "engine": engine.model_dump(), "recipe": Recipe.parse(recipe).to_dict(),
            "verdict": verdict, "goal": "lower_cost", "target": "h100", "model": tree.model_dump(),
            "evidence": tree.model_dump(),
        })  # fmt: skip

    return make


def triton_config(path):
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse(path.read_text(), ModelConfig())


def test_the_llm_api(tmp_path, released):
    uri = released("{quantize: {format: fp8, kv_cache: fp8}, engine: {backend: trtllm, tensor_parallel_size: 2, "
                   "max_batch_size: 64, max_num_tokens: 4096}}")  # fmt: skip
    folder = tmp_path / "out"
    files = write(artifact.find(uri), folder)
    assert files == sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    arguments = yaml.safe_load((folder / "llm_args.yaml").read_text())
    assert arguments == llm_args(arguments, "1.2.1") and arguments["tensor_parallel_size"] == 2

    config = triton_config(folder / "triton" / "tensorrt_llm" / "config.pbtxt")
    assert config.name == "tensorrt_llm" and config.backend == "python"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert not config.HasField("model_transaction_policy") and config.max_batch_size == 0, "they stand in model.yaml"
    required = [tensor.name for tensor in config.input if not tensor.optional]
    assert required == ["text_input"] and "sampling_param_max_tokens" in {tensor.name for tensor in config.input}
    assert config.output[0].name == "text_output"
    model = yaml.safe_load((folder / "triton" / "tensorrt_llm" / "1" / "model.yaml").read_text())
    assert model.pop("triton_config") == {"max_batch_size": 0, "decoupled": True}
    assert model == {"model": "/models/Smol_LM", "backend": "pytorch", **arguments}

    service = yaml.safe_load((folder / "kserve.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == "smol-lm"
    container = service["spec"]["predictor"]["containers"][0]
    assert container["image"] == "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
    assert container["args"][:4] == ["trtllm-serve", "/mnt/models", "--extra_llm_api_options", "/tmp/llm_args.yaml"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["STORAGE_URI"] == "pvc://Smol_LM/" and yaml.safe_load(environment["LLM_ARGS"]) == arguments
    subprocess.run(["sh", "-n", folder / "serve.sh"], check=True)
    command = "exec trtllm-serve /models/Smol_LM --extra_llm_api_options llm_args.yaml"
    assert command in (folder / "serve.sh").read_text()
    readme = (folder / "README.md").read_text()
    assert "recovery 0.99 (0.97 to 1.01)" in readme and "trimtab artifact export file:///" in readme


def test_the_container_hands_its_arguments_on(tmp_path):
    write(artifact.find(str(export(tmp_path / "export"))), tmp_path / "out")
    service = yaml.safe_load((tmp_path / "out" / "kserve.yaml").read_text())
    container = service["spec"]["predictor"]["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    settings = tmp_path / "args.yaml"
    command = [part.replace("/tmp/llm_args.yaml", str(settings)) for part in container["command"]]
    done = subprocess.run([*command, "echo", *container["args"][1:]], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("/mnt/models --extra_llm_api_options /tmp/llm_args.yaml --host 0.0.0.0 --port 8080")
    assert settings.read_text() == environment["LLM_ARGS"]


def test_the_container_waits_for_a_modelcar(tmp_path, released):
    """KServe starts it beside the server, whose model is not there before the image runs."""
    uri = "oci://registry.example/models/tiny@sha256:" + 64 * "0"
    write(artifact.find(str(export(tmp_path / "export"))), tmp_path / "out", model_uri=uri)
    container = yaml.safe_load((tmp_path / "out/kserve.yaml").read_text())["spec"]["predictor"]["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["STORAGE_URI"] == uri and container["args"][:2] == ["trtllm-serve", "/mnt/models"]
    for old, new in (("/mnt/models", str(tmp_path / "models")), ("/tmp/llm_args.yaml", str(tmp_path / "args"))):
        container["command"] = [part.replace(old, new) for part in container["command"]]
    server = subprocess.Popen([*container["command"], "echo", "serves"], env=environment, stdout=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(0.2)
    (tmp_path / "models").symlink_to(tmp_path / "export")
    assert server.communicate(timeout=60)[0] == b"serves\n"

    legacy = artifact.find(released(f"{{quantize: {{format: int8_sq}}, {LEGACY}}}"))
    with pytest.raises(InputError, match="holds the checkpoint alone, and trtllm-legacy reads engines"):
        write(legacy, tmp_path / "legacy", model_uri=uri)


def test_engines(tmp_path, released):
    uri = released(f"{{quantize: {{format: int8_sq, kv_cache: int8}}, {LEGACY}}}")
    folder = tmp_path / "out"
    write(artifact.find(uri, model_path="/m"), folder, model_uri="s3://bucket/smol", image="registry.example/trtllm:1")
    config = triton_config(folder / "triton" / "tensorrt_llm" / "config.pbtxt")
    assert config.backend == "tensorrtllm" and config.max_batch_size == 32
    assert config.model_transaction_policy.decoupled and list(config.dynamic_batching.preferred_batch_size) == [32]
    values = {name: parameter.string_value for name, parameter in config.parameters.items()}
    assert values.items() >= {
        "gpt_model_type": "inflight_fused_batching", "gpt_model_path": "/engines/Smol_LM",
        "batch_scheduler_policy": "max_utilization", "kv_cache_free_gpu_mem_fraction": "0.85",
        "enable_kv_cache_reuse": "false", "enable_chunked_context": "true",
    }.items()  # fmt: skip
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["input_lengths", "request_output_len"]
    subprocess.run(["sh", "-n", folder / "triton" / "fill_templates.sh"], check=True)
    arguments = yaml.safe_load((folder / "llm_args.yaml").read_text())
    assert arguments.keys() == {"kv_cache_config", "scheduler_config"}, "the limits are compiled in"
    command = "trtllm-serve /engines/Smol_LM --backend tensorrt --tokenizer /m --extra_llm_api_options llm_args.yaml"
    assert command in (folder / "serve.sh").read_text()
    container = yaml.safe_load((folder / "kserve.yaml").read_text())["spec"]["predictor"]["containers"][0]
    assert container["image"] == "registry.example/trtllm:1" and container["env"][0]["value"] == "s3://bucket/smol"
    assert container["args"][1:5] == ["/mnt/models/engine", "--backend", "tensorrt", "--tokenizer"]


def test_the_script_fills_the_templates_of_a_checkout(tmp_path, released):
    write(artifact.find(released(f"{{quantize: {{format: int8_sq}}, {LEGACY}}}")), tmp_path / "out")
    checkout = tmp_path / "triton_backend"
    for model in ("preprocessing", "postprocessing", "ensemble", "tensorrt_llm_bls"):
        folder = checkout / "all_models" / "inflight_batcher_llm" / model
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text("max_batch_size: ${triton_max_batch_size}\n")
    (checkout / "tools").mkdir()
    (checkout / "tools" / "fill_template.py").write_text(
        "import string, sys\n_, flag, path, values = sys.argv\nassert flag == '-i'\n"
        "pairs = dict(pair.split(':', 1) for pair in values.split(','))\n"
        "text = open(path).read()\nopen(path, 'w').write(string.Template(text).substitute(pairs))\n"
    )
    subprocess.run([tmp_path / "out" / "triton" / "fill_templates.sh", checkout], check=True)
    for model in ("preprocessing", "postprocessing", "ensemble", "tensorrt_llm_bls"):
        assert triton_config(tmp_path / "out" / "triton" / model / "config.pbtxt").max_batch_size == 32


def test_static_batching_is_called_v1():
    settings = Recipe.parse("engine: {backend: trtllm-legacy, scheduler_policy: static_batch}").engine
    found = engine_parameters(settings, "/e")
    assert (found["gpt_model_type"], found["batch_scheduler_policy"]) == ("V1", "guaranteed_no_evict")


def _mixed(*algos: str) -> str:
    layers = {f"model.layers.{n}.mlp.up_proj": {"quant_algo": algo} for n, algo in enumerate(algos)}
    return json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(),
         "is no export and no release; write a folder with config.json, or a URI"),
        (lambda f: (f / "rank0.safetensors").touch(),
         "holds rank0.safetensors, a checkpoint for trtllm-build; write the"),
        (lambda f: (f / "hf_quant_config.json").unlink(), "lacks hf_quant_config.json, which says its precision; copy"),
        (lambda f: (f / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W3"}}'),
         "quantized with W3"),
        (lambda f: (f / "hf_quant_config.json").write_text("{"), "cannot be read (Expecting property name"),
        (lambda f: (f / "hf_quant_config.json").write_text(_mixed("W8A16", "W4A16_AWQ")),
         "artifact: trtllm does not serve mixed; it serves: fp32, fp16, bf16, fp8"),
        (lambda f: (f / "hf_quant_config.json").write_text(_mixed("W8A16", "NVFP4")),
         "mixes NVFP4, W8A16, as no format of trimtab does; quantize it again"),
        (lambda f: (f / "hf_quant_config.json").write_text(
            '{"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}}'),
         "artifact: trtllm serves no KV cache in int8; it serves: fp8, nvfp4"),
    ],
)  # fmt: skip
def test_what_no_server_should_be_given(tmp_path, change, message, capsys):
    folder = export(tmp_path / "export")
    change(folder)
    assert main.main(["serve-config", str(folder), str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


OTHERS = [
    ("torch", [], "exec trimtab serve /models/Smol_LM --recipe recipe.yaml"),
    ("vllm", [], "exec vllm serve /models/Smol_LM --tensor-parallel-size 1"),
    ("vllm", ["checkpoint/config.json"], "exec vllm serve /engines/Smol_LM/checkpoint --tensor-parallel-size 1"),
]


@pytest.mark.parametrize(("backend", "built", "command"), OTHERS)
def test_a_release_of_another_engine_is_a_command(backend, built, command, tmp_path, released):
    uri = released(f"{{quantize: {{format: int4_awq}}, engine: {{backend: {backend}, max_batch_size: 4}}}}", built)
    assert main.main(["serve-config", uri, str(tmp_path / "out")]) == 0
    script = (tmp_path / "out" / "serve.sh").read_text()
    subprocess.run(["sh", "-n", tmp_path / "out" / "serve.sh"], check=True)
    assert command in script and script.rstrip().endswith('"$@"')
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "recovery 0.99 (0.97 to 1.01)" in readme and "trimtab artifact export file:///" in readme
    if backend == "torch":
        recipe = Recipe.parse((tmp_path / "out" / "recipe.yaml").read_text())
        assert recipe.engine.max_batch_size == 4
    else:
        assert "--max-num-seqs 4" in script


def test_a_recipe_serves_in_the_place_of_the_release_s(tmp_path, released):
    uri = released("{quantize: {format: int4_awq}}")
    (tmp_path / "recipe.yaml").write_text("engine: {backend: trtllm, max_batch_size: 4}")
    assert main.main(["serve-config", uri, str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    assert yaml.safe_load((tmp_path / "out" / "llm_args.yaml").read_text())["max_batch_size"] == 4


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    served = artifact.find(str(export(tmp_path / "export")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for folder, message in ((tmp_path / "full", "is there already"), (tmp_path / "no" / "out", "no' is not a folder")):
        with pytest.raises(InputError, match=message):
            write(served, folder)
    written = []

    def fails_at_the_third(path, *arguments, **options):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return text_of(path, *arguments, **options)

    text_of = type(tmp_path).write_text
    monkeypatch.setattr(type(tmp_path), "write_text", fails_at_the_third)
    with pytest.raises(InputError, match="cannot be written"):
        write(served, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "full"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    write(served, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")


def test_an_engine_is_planned_from_a_config_alone(capsys, tmp_path):
    config = str(Path(__file__).parent.parent / "configs" / "llama-3.1-70b.json")
    (tmp_path / "workload.yaml").write_text("{concurrency: 64}")
    options = ["--model", config, "--target", "h100", "--workload", str(tmp_path / "workload.yaml")]
    assert main.main(["plan", "--engine", *options]) == 0
    said = capsys.readouterr().out
    assert "4 x 1" in said and "not 2 x 1" in said and "163,840" in said
    engine = said.partition("engine:")[2].strip()
    assert Recipe.parse({"engine": json.loads(engine)}).engine.tensor_parallel_size == 4
    assert main.main(["plan", "--engine", *options[:-2], "--gpus", "1"]) == 2
    assert "not one request fits on 1 h100" in " ".join(capsys.readouterr().err.split())
