"""How parts feed each other, and what a bundle without an engine says."""

import pytest
import torch

from pixart_rt.backends.engine_files import Chain, FunctionPart, engine_paths, one_line, part_inputs
from pixart_rt.errors import BackendError, BundleError


def test_each_part_takes_the_previous_output_as_hidden():
    def first(input_ids, attention_mask):
        return (input_ids * attention_mask).float()

    def later(hidden, attention_mask):
        return hidden * 10 + attention_mask

    chain = Chain(
        "text_encoder",
        [
            FunctionPart(function, part_inputs("text_encoder", index))
            for index, function in enumerate([first, later, later])
        ],
    )
    ids, mask = torch.tensor([[3, 4]]), torch.tensor([[1, 0]])
    # 3 -> 3 * 10 + 1 -> 31 * 10 + 1; 4 is masked to 0 and stays there
    assert chain(input_ids=ids, attention_mask=mask).tolist() == [[311.0, 0.0]]


def test_a_missing_input_is_named():
    chain = Chain("vae_decoder", [FunctionPart(lambda latents: latents, ("latents",))])
    with pytest.raises(BackendError, match=r"vae_decoder needs the input 'latents'.*\['latent'\]"):
        chain(latent=torch.zeros(1))


def test_missing_component_and_missing_engine(make_bundle, tmp_path):
    (tmp_path / "transformer").mkdir()
    bundle, manifest = make_bundle("transformer", ("transformer/engine.onnx",))
    with pytest.raises(BundleError, match="has no vae_decoder, only transformer"):
        engine_paths(bundle, manifest, "vae_decoder")
    with pytest.raises(BundleError, match=r"engine\.onnx is missing"):
        engine_paths(bundle, manifest, "transformer")
    (tmp_path / "transformer" / "engine.onnx").touch()
    with pytest.raises(BundleError, match=r"engine\.onnx is empty"):
        engine_paths(bundle, manifest, "transformer")


def test_one_line_of_an_error_is_its_first_that_says_something():
    assert one_line(ValueError("\n  \n cause \n detail")) == "cause"
    assert one_line(ValueError()) == "ValueError"
