import pytest
import torch
from transformers import AutoModelForImageClassification

import hermes
from hermes.errors import InputError
from hermes.tasks.classification import classify_images, prepare_images
from hermes.tasks.image import open_images

Image = pytest.importorskip("PIL.Image", reason="Pillow is in the extra [image]")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 90).save(root / "grey.png")
    Image.linear_gradient("L").convert("RGBA").save(root / "alpha.png")
    return [root / "grey.png", root / "alpha.png"]


def test_streamed_labels_are_resident_labels(tiny, pictures):
    directory = tiny("tiny-vit")
    pixels = prepare_images(directory, open_images(pictures))
    assert pixels.shape == (2, 3, 32, 32)
    resident = AutoModelForImageClassification.from_pretrained(directory, dtype="auto").eval()
    expected = classify_images(resident, pixels, top_k=3)
    with hermes.load(directory, budget="8GiB", batch_size=2, resident_bytes=0) as model:
        assert classify_images(model, pixels, top_k=3) == expected
    scores = [label.score for label in expected[0]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert expected[0][0].label.startswith("LABEL_")


def test_all_labels_add_up(tiny, pictures):
    directory = tiny("tiny-vit")
    model = AutoModelForImageClassification.from_pretrained(directory, dtype=torch.bfloat16).eval()
    (labels,) = classify_images(model, prepare_images(directory, open_images(pictures[:1])), top_k=50)
    assert len(labels) == 10
    assert sum(label.score for label in labels) == pytest.approx(1.0, abs=1e-4)


def test_unreadable_images(tmp_path, pictures):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:200])
    for name in ("text.png", "cut.png", "absent.png"):
        with pytest.raises(InputError, match=name):
            open_images([tmp_path / name])
    with pytest.raises(InputError, match="no image was given"):
        open_images([])


def test_no_image_processor(tmp_path, pictures):
    with pytest.raises(InputError, match="no image processor"):
        prepare_images(tmp_path, open_images(pictures))
