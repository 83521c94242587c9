"""The eager and the compiled backend, against the module they were written from."""

import pytest
import torch

from pixart_rt.backends import get_backend
from pixart_rt.checkpoints.bundle_module import save_module
from pixart_rt.errors import BackendError, BundleError
from pixart_rt.export.onnx_export import transformer_inputs

from .conftest import CONFIG, VAE

CPU = torch.device("cpu")

# torch's own, when TorchInductor is first imported
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


@pytest.fixture
def torch_bundle(make_bundle, transformer, tmp_path):
    (tmp_path / "transformer").mkdir()
    save_module(tmp_path / "transformer", transformer, CONFIG)
    return make_bundle("transformer", ("transformer/model.safetensors",))


def test_eager_is_the_module(torch_bundle, transformer):
    component = get_backend("torch").load(*torch_bundle, "transformer", CPU)
    inputs = transformer_inputs(CONFIG, batch=2, num_tokens=7)
    actual = component(**inputs)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, transformer(**inputs), atol=0, rtol=0)


def test_absorbed_text_is_the_same_text(torch_bundle, transformer):
    """The other form that PyTorch's backends take; its folding is tested with the text side."""
    component = get_backend("torch").load(*torch_bundle, "transformer", CPU)
    inputs = transformer_inputs(CONFIG, batch=2, num_tokens=7)
    kv = inputs.pop("text_kv")
    keys = torch.zeros(len(kv), 2, CONFIG.num_heads * 16, CONFIG.hidden_size)
    with pytest.raises(BackendError, match="absorbed_bias"):
        component(**inputs, absorbed_keys=keys)
    bias = torch.zeros(len(kv), 2, CONFIG.num_heads, 16)
    # Values without any of the text: what `absorb` leaves is the projection's bias, a head's share
    # of it in each.
    biases = [block.cross_attn.proj.bias for block in transformer.core.blocks]
    shares = torch.stack(biases) / CONFIG.num_heads
    values = shares[None, :, None].expand_as(keys).contiguous()
    absorbed = component(**inputs, absorbed_keys=keys, absorbed_bias=bias, absorbed_values=values)
    standard = component(**inputs, text_kv=torch.zeros_like(kv))
    torch.testing.assert_close(absorbed, standard)


def test_the_version_follows_every_change_of_a_weight(torch_bundle):
    """What keeps a captured graph from being replayed on other weights."""
    component = get_backend("torch").load(*torch_bundle, "transformer", CPU)
    module = component._module
    weight = module.core.blocks[0].mlp.fc1.weight
    seen = {component.version()}
    assert component.version() in seen
    weight.mul_(1.0)
    seen.add(component.version())
    module.load_state_dict({name: t.clone() for name, t in module.state_dict().items()})
    seen.add(component.version())
    weight.data = weight.data.clone()
    seen.add(component.version())
    assert len(seen) == 4


def test_eager_refuses_truncated_weights(torch_bundle, tmp_path):
    weights = tmp_path / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BundleError, match="damaged"):
        get_backend("torch").load(*torch_bundle, "transformer", CPU)


def test_compiled_serves_all_sizes_with_two_compilations(torch_bundle, transformer):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    component = get_backend("torch-compile").load(*torch_bundle, "transformer", CPU)
    for batch, num_tokens in ((2, 7), (2, 16), (4, 33), (1, 9), (1, 40)):
        inputs = transformer_inputs(CONFIG, batch=batch, num_tokens=num_tokens)
        # float32 sums in another order
        torch.testing.assert_close(component(**inputs), transformer(**inputs), atol=1e-5, rtol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2  # batches above one, and one
    assert not counters["graph_break"]


def test_eager_decodes_channels_last_what_the_module_decodes(make_bundle, vae_decoder, tmp_path):
    (tmp_path / "vae_decoder").mkdir()
    save_module(tmp_path / "vae_decoder", vae_decoder, VAE)
    bundle = make_bundle("vae_decoder", ("vae_decoder/model.safetensors",))
    for device in [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
        component = get_backend("torch").load(*bundle, "vae_decoder", device)
        latents = torch.randn(2, 4, 5, 7)
        image = component(latents=latents.to(device)).cpu()
        assert image.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(image, vae_decoder(latents), atol=1e-4, rtol=1e-4)
