"""Labels by name or number; bad ones are explained."""

import numpy as np
import pytest

pytest.importorskip("diffusers")
from pipelines import draw, piped

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("white shrak", ValueError, "'white shrak'; did you mean 'white shark'"),
        ("crane", ValueError, r"classes \[1, 2\]; give the number"),
        (3, ValueError, "class label=3: expected an integer from 0 to 2"),
        ([0, -1], ValueError, "class label=-1"),
        (True, TypeError, "class label=True"),
        ([0.5], TypeError, "class label=0.5: expected an integer"),
        ([[0], [3]], ValueError, "class label=3: expected an integer from 0 to 2"),
        (np.array([0.0]), TypeError, "class label=0.0: expected an integer"),
        (np.array([True]), TypeError, "class label=True"),
        (None, ValueError, "class_labels are missing for 3 classes"),
    ],
)
def test_bad_labels_are_explained(labels, error, message):
    with pytest.raises(error, match=message):
        draw(piped(), labels)


def test_names_outside_the_table_are_refused():
    with pytest.raises(ValueError, match="'3': 'dog', but classes are 0 to 2"):
        piped(id2label={3: "dog"})
