"""The notebook runs from top to bottom in under three minutes, shows what it says, and is committed without outputs."""

import base64
import io
import json
import time
from pathlib import Path

import nbformat
import pytest
from matplotlib.image import imread
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "anomaly_detection.ipynb"
STEPS = ("Explore", "Preprocess", "Train", "Score", "Calibrate", "Evaluate", "Explain", "Export",
         "Before you believe it")
FIGURES = {"explore": 5, "evaluate": 1, "explain": 4}
ASKED = """
import json
print(json.dumps({"shapes": [X_train.shape, X_test.shape, energy.shape, score.shape], "anomalies": int(y_test.sum()),
                  "same_events": bool((y_test == test.label).all()), "largest_difference": float(largest_difference),
                  "threshold": threshold.energy, "guaranteed": threshold.guaranteed, "results": results,
                  "losses": history.train_loss, "flagged": int(flagged[y_test == 0].sum()), "ok": report.ok,
                  "exported": float(np.abs(exported.energy(test.x[:100]) - energy[:100]).max() / energy.std()),
                  "saved": Bundle.load(OUT / "model").digest == bundle.digest}))
"""


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all its cells, and what a last one, that is the test's, prints; seconds it took."""
    notebook, start = read(), time.monotonic()
    notebook.cells.append(nbformat.v4.new_code_cell("from ebm.bundle import Bundle\n" + ASKED))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            patch.setenv(name, "1")
        where = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
        NotebookClient(notebook, timeout=180, resources=where).execute()
    return notebook, json.loads(printed(notebook.cells.pop())), time.monotonic() - start


def printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def test_it_is_committed_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count, cell.metadata) == ([], None, {}), cell.id
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_every_step_is_there_in_order():
    titles = [cell.source.splitlines()[0] for cell in read().cells if cell.source.startswith("## ")]
    assert titles == [f"## {i} {step}" for i, step in enumerate(STEPS, 1)]


def test_it_runs_in_under_three_minutes_and_warns_of_nothing(executed):
    notebook, _, seconds = executed
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [o.text for cell in code for o in cell.outputs if o.get("name") == "stderr"] == []
    assert seconds < 180


def test_it_computes_what_it_says(executed):
    _, said, _ = executed
    (n_train, d), (n_test, _), energies, score = said["shapes"]
    assert (d, energies, score) == (64, [n_test], [n_test, 64])
    assert n_train > n_test > said["anomalies"] > 0
    assert said["same_events"]
    assert max(said["largest_difference"], said["exported"]) < 1e-4
    assert said["guaranteed"]
    assert said["flagged"] <= 1e-3 * n_test
    assert said["losses"][-1] < 0.9 * said["losses"][0]
    assert said["results"]["energy"]["auroc"] > 0.7
    assert set(said["results"]) == {"energy", "score norm", "autoencoder", "|x|"}
    assert said["ok"]
    assert said["saved"]


def test_its_sentences_have_the_figures(executed):
    notebook, said, _ = executed
    text = {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert f"test:  {said['shapes'][1][0]:,} events, {said['anomalies']} of them anomalous" in text["preprocess"]
    assert f"an event is flagged above E = {said['threshold']:.4g};" in text["calibrate"]
    assert f"energy        {said['results']['energy']['auroc']:.3f}" in text["evaluate"]
    assert "features with the largest pulls" in text["explain"]
    assert "every check agrees with float64" in text["export"]
    assert "model digest" in text["provenance"]


def test_its_figures_are_drawn(executed):
    notebook, _, _ = executed
    drawn = {cell.id: [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
             for cell in notebook.cells if cell.cell_type == "code"}
    assert {name: len(figures) for name, figures in drawn.items() if figures} == FIGURES
    for figure in (f for figures in drawn.values() for f in figures):
        pixels = imread(io.BytesIO(base64.b64decode(figure)))
        assert pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.05
