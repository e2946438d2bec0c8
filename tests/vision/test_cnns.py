"""The CNNs of examples/vision: streamed as resident, large matrices by rows, pictures in and out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hermes
from hermes.memory.probe import resident_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "vision"))
from cnns import MODELS
from pictures import SCENES, draw_boxes, draw_mask, paint, read_picture, tensor_of
from weights import write_weights

SIDES = {"resnet101": 64, "vgg19": 64, "fcn-resnet50": 64, "fcn-resnet101": 48, "yolov3": 64}
WEIGHT_MIB = {"resnet101": 170, "vgg19": 548, "fcn-resnet50": 135, "fcn-resnet101": 207, "yolov3": 236}


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes(name):
    with torch.device("meta"):
        module = MODELS[name].build()
    assert round(sum(p.numel() for p in module.parameters()) * 4 / 2**20) == WEIGHT_MIB[name]


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["out", "alexnet"], 2)])
def test_weights_are_written_only_when_asked_for(tmp_path, arguments, code):
    script = Path(write_weights.__code__.co_filename)
    done = subprocess.run([sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_streamed_is_resident(tmp_path, name):
    path = tmp_path / "w.safetensors"
    with torch.device("meta"):
        module = MODELS[name].build(0.125)
    write_weights(module, path)
    resident = MODELS[name].build(0.125)
    resident.load_state_dict(load_file(path))
    inputs = [tensor_of(paint(scene), SIDES[name]) for scene in SCENES[:2]]
    budget = resident_bytes() + 300 * 2**20
    with (
        torch.no_grad(),
        hermes.stream(
            module, path, budget, example_args=(inputs[0],), resident_bytes=0, matrix_bytes=2**20
        ) as streamed,
    ):
        for pixels in inputs * 2:
            expected, got = resident(pixels), streamed(pixels)
            for key in expected if isinstance(expected, dict) else [...]:
                assert torch.isfinite(expected[key]).all()
                assert expected[key].std() > 0
                assert torch.equal(got[key], expected[key])
        units = streamed.hermes.prepared.partition.units
        assert any(unit.rows for unit in units) == (name == "vgg19")  # whose largest matrix has 6 MiB here


def test_weights_are_the_same_each_time(tmp_path):
    module = MODELS["resnet101"].build(0.125)
    for number in range(2):
        write_weights(module, tmp_path / f"{number}.safetensors")
    write_weights(module, tmp_path / "other.safetensors", seed=1)
    first, second, other = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("0", "1", "other"))
    assert first == second != other
    # Nothing has to be moved to a cache line: all but odd scalars begin at one.
    data = 8 + int.from_bytes(first[:8], "little")
    assert data % 64 == 0


def test_boxes_and_masks(tmp_path):
    picture = read_picture("road")
    picture.save(tmp_path / "road.png")
    assert read_picture(tmp_path / "road.png").tobytes() == picture.tobytes()
    boxes = torch.zeros(1, 3, 85)
    boxes[0, 0, :5] = torch.tensor([32.0, 32.0, 20.0, 20.0, 0.9])
    boxes[0, 0, 5] = 1
    drawn = draw_boxes(picture, boxes, 64, count=1)
    edge = picture.width * 22 // 64
    assert drawn.getpixel((edge, picture.height // 2)) != picture.getpixel((edge, picture.height // 2))
    assert drawn.getpixel((2, picture.height - 2)) == picture.getpixel((2, picture.height - 2))
    scores = torch.zeros(1, 21, 4, 4)
    scores[:, 3, :, 2:] = 1
    mask = draw_mask(picture, scores)
    assert mask.getpixel((10, 10)) != mask.getpixel((picture.width - 10, 10))
