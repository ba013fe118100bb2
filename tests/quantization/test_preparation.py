import pytest
import torch
from support import calibrate

import repblocks as rb
from repblocks.errors import ConfigurationError
from repblocks.quantization import PREPARATIONS, best_prepared, equalized, prepared, quantize


def images():
    return torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return calibrate(
        rb.create_model("rb_repvgg_cifar", num_classes=4, in_chans=1, depths=(1, 1, 1), widths=(8, 8, 8)), images()
    )


@pytest.mark.parametrize("how", PREPARATIONS)
def test_every_way_gives_a_deploy_copy_and_only_corrected_ones_compute_something_else(model, how):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copy = prepared(model, images(), how)
    assert rb.form_of(copy) == "deploy"
    assert rb.verify(model, copy, images()).passed == ("corrected" not in how)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    changed = not copy.state_dict()["stem.conv.conv.weight"].equal(
        rb.deployed(model).state_dict()["stem.conv.conv.weight"]
    )
    assert changed == ("equalized" in how)


def test_equalizing_by_activations_looks_at_the_images(model):
    by_images = prepared(model, images(), "equalized-by-activations").state_dict()
    assert same(by_images, equalized(model, activations=images()).model.state_dict())
    assert not same(by_images, equalized(model).model.state_dict())
    assert not same(by_images, prepared(model, images() * 3 + 1, "equalized-by-activations").state_dict())


def same(first, second):
    return first.keys() == second.keys() and all(value.equal(second[key]) for key, value in first.items())


def test_the_best_way_is_the_one_whose_int8_outputs_are_nearest(model, tmp_path):
    best = best_prepared(model, images())
    assert list(best.output_sqnr_db) == list(PREPARATIONS)
    assert best.output_sqnr_db[best.how] == max(best.output_sqnr_db.values())
    report = quantize(best.model, images(), tmp_path, reference=model)
    assert report.output_sqnr_db == pytest.approx(best.output_sqnr_db[best.how], abs=1e-6)


def test_an_unknown_way_is_answered_with_the_known_ones(model):
    with pytest.raises(ConfigurationError, match="how=magic is unknown; there are 6: corrected, equalized"):
        prepared(model, images(), "magic")


def test_half_precision_is_refused_with_the_way_out(model):
    with pytest.raises(
        ConfigurationError, match=r"weights in torch.float16; needed float32: quantize model\.float\(\)"
    ):
        best_prepared(rb.deployed(model).half(), images())
