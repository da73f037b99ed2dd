"""Stage train_diagnosis: the diagnostic model, learned from the patients outside the test split."""

from pipelines.cells import MODEL, in_force
from pipelines.patients import DIAGNOSIS, EMPTY, diagnosed
from smearline import diagnosis, plain_json
from smearline.recognition import RecognitionModel


def main() -> None:
    params = in_force()
    found = diagnosed(params)
    for why, count in found.left_out.items():
        if count:
            print(f"left out: {count} smears, {why}")
    part = found.summary[found.summary["split"] != "test"].reset_index(drop=True)
    DIAGNOSIS.mkdir(parents=True, exist_ok=True)
    if part["group"].nunique() < 2:
        because = EMPTY if not found.left_out else f"fewer than two groups can be learned: {found.not_available}"
        absent = {"because": because, "not_available": found.not_available}
        plain_json.write(DIAGNOSIS / diagnosis.ABSENT_FILE, absent)
        print(f"no diagnostic model: {because}")
        return
    (DIAGNOSIS / diagnosis.ABSENT_FILE).unlink(missing_ok=True)
    model = diagnosis.write(
        DIAGNOSIS,
        part,
        found.counts,
        part["group"],
        params.diagnosis,
        not_available=found.not_available,
        embedding_version=RecognitionModel(MODEL).embedding_version,
        origin=found.origin,
    )
    print(f"{', '.join(model.card.groups)}: {model.card.num_patients} patients, {len(model.card.features)} features")


if __name__ == "__main__":
    main()
