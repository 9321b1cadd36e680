"""The profile of a cluster: what it may say, and which mistakes it names."""

import pytest

from trimtab.base.errors import InputError
from trimtab.stages.profile import Profile

REFUSED = [
    ("gpus: {}", "gpus: unknown key 'gpus'; write 'gpu'"),
    ("gpu: {node_selectors: {}}", "gpu.node_selectors: unknown key 'node_selectors'; write 'node_selector'"),
    ("gpu: {tolerations: [{operator: Exist}]}", "'Exist' is not valid; write 'Exists'"),
    ("gpu: {tolerations: [{value: gpu}]}", "has operator Equal and no key; write the key, or operator: Exists"),
    ("gpu: {tolerations: [{operator: Exists, key: a, value: b}]}", "has operator Exists and a value; remove the value"),
    ("shared_memory: 16GB", "shared_memory: '16GB' is not a Kubernetes quantity; write such as '4', '500m' or '16Gi'"),
    ("stage: {memory: lots}", "stage.memory: 'lots' is not a Kubernetes quantity"),
    ("stage: {timeout_hours: 0}", "stage.timeout_hours: 0 should be greater than 0"),
    ("stages: {destill: {retries: 1}}", "has no stage 'destill'; write 'distill'"),
    ("environment: {AWS_SECRET_ACCESS_KEY: abc}", "has AWS_SECRET_ACCESS_KEY, which anyone who sees the pipeline"),
    ("images: {cuda: registry/trimtab}", "images.cuda: 'registry/trimtab' has no tag that stays; write name:version"),
    ("secrets: {keys: {gate.pem: TRIMTAB_SIGNING_KEY}}",
     "secrets: {'keys': {'gate.pem': 'TRIMTAB_SIGNING_KEY'}} has TRIMTAB_SIGNING_KEY, which every task would see"),
    ("signing: {key: gate.pem}", "signing.secret: is required"),
    ("secrets: {keys: {key: TRIMTAB_VALIDATION_KEY}}", "has TRIMTAB_VALIDATION_KEY, which every task would see; write"),
    ("gate_secrets: {keys: {key: TRIMTAB_SIGNING_KEY}}", "has TRIMTAB_SIGNING_KEY, which every task would see"),
    ("signing: {secret: a, validation: {secret: b}}", "signing.validation.public: is required"),
    ("signing: {secret: a, validation: {secret: b, public: a.pub}}", "is not a public key in PEM; write the text"),
    ("images: {engine: registry/trtllm}", "images.engine: 'registry/trtllm' has no tag that stays"),
    ("images: {cuda: 'registry:5000/trimtab:latest'}", "has no tag that stays"),
    ("cache: {claim: My_Cache}", "cache.claim: 'My_Cache' is not a name of Kubernetes"),
    ("secrets: {s3: {key: NOT-A-NAME}}", "is not the name of an environment variable"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused(text, message):
    with pytest.raises(InputError) as raised:
        Profile.parse(text)
    assert message in str(raised.value)


def test_a_stage_of_its_own_keeps_what_it_does_not_say():
    profile = Profile.parse("{stage: {memory: 16Gi, retries: 2}, stages: {distill: {memory: 64Gi}}}")
    assert (profile.limits("distill").memory, profile.limits("distill").retries) == ("64Gi", 2)
    assert profile.limits("quantize").memory == "16Gi"


def test_a_digest_needs_no_tag():
    assert Profile.parse("images: {cuda: 'registry:5000/trimtab@sha256:0123'}").images.cuda
