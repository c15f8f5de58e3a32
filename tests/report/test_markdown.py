import pytest

from normprop.report.markdown import tables


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables_have_the_documents_numbers(make_document):
    document = make_document(["none", "normprop", "batch"], batch_sizes=[1, 8], seeds=[0, 1, 2])
    found = rows(tables(document))
    cells = {(row[0].strip("`"), size): cell for row in found[2:5] for size, cell in zip((8, 1), row[1:], strict=True)}
    assert found[0] == ["method", "batch 8", "batch 1"]
    for row in document["table"]:
        cell = cells[row["method"], row["batch_size"]]
        if row["impossible"]:
            assert cell == "cannot run [1]"
        elif row["error_mean"] is not None:
            assert cell.startswith(f"{100 * row['error_mean']:.1f} ± {100 * row['error_std']:.1f} ({row['best_lr']:g}")
            assert ("*" in cell) == row["edge"]
    assert f"1. {next(row['impossible'] for row in document['table'] if row['impossible'])}" in tables(document)


def test_every_rate_that_ran_is_listed(make_document):
    document = make_document(["none", "batch"], batch_sizes=[8], lrs=[0.01, 0.1], seeds=[0, 1])
    found = rows(tables(document).split("## Every rate")[1])[2:]
    assert [(row[1], row[2]) for row in found] == [(f"`{m}`", lr) for m in ("none", "batch") for lr in ("0.01", "0.1")]
    for row in found:
        runs = [t for t in document["trials"] if f"`{t['method']}`" == row[1] and f"{t['lr']:g}" == row[2]]
        complete = [run for run in runs if run["status"] == "complete"]
        lost = len(runs) - len(complete)
        assert row[-1] == (f"{lost} of {len(runs)}" if lost else "")
        if complete:
            mean = sum(run["test_error"] for run in complete) / len(complete)
            assert float(row[5].split(" ")[0]) == pytest.approx(100 * mean, abs=0.06)
