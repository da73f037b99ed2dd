"""The analyser's IP messages and Q-Flags, raised from the values it measured."""

from __future__ import annotations

import numpy as np

Measured = dict[str, float]

FLAG_GROUPS: dict[str, tuple[str, ...]] = {
    "IP ABN(WBC)": (
        "WBC Abn Scattergram", "Neutropenia", "Neutrophilia", "Lymphopenia", "Lymphocytosis", "Monocytosis",
        "Eosinophilia", "Basophilia", "Leukocytopenia", "Leukocytosis", "NRBC Present", "IG Present",
    ),
    "IP ABN(RBC)": (
        "RBC Abn Distribution", "Dimorphic Population", "Anisocytosis", "Microcytosis", "Macrocytosis", "Hypochromia",
        "Anemia", "Erythrocytosis", "RET Abn Scattergram", "Reticulocytosis",
    ),
    "IP ABN(PLT)": ("PLT Abn Distribution", "Thrombocytopenia", "Thrombocytosis", "PLT Abn Scattergram"),
    "IP SUS(WBC)": ("Blasts/Abn Lympho?", "Blasts?", "Abn Lympho?", "Left Shift?", "Atypical Lympho?"),
    "IP SUS(RBC)": (
        "RBC Agglutination?", "Turbidity/HGB Interf?", "Iron Deficiency?", "HGB Defect?", "Fragments?", "pRBC?",
    ),
    "IP SUS(PLT)": ("PLT Clumps?",),
}  # fmt: skip
Q_FLAGS = (
    "Blasts/Abn Lympho?", "Blasts?", "Abn Lympho?", "Left Shift?", "Atypical Lympho?", "RBC Agglutination?",
    "Turbidity/HGB Interf?", "Iron Deficiency?", "HGB Defect?", "Fragments?", "PLT Clumps?",
)  # fmt: skip
# A message for each value beyond its threshold: (value, above or below, threshold). Made up, near common review rules.
RULES: dict[str, tuple[str, str, float]] = {
    "WBC Abn Scattergram": ("MONO%", ">", 30), "Neutropenia": ("NEUT#", "<", 1.0), "Neutrophilia": ("NEUT#", ">", 11.0),
    "Lymphopenia": ("LYMPH#", "<", 0.8), "Lymphocytosis": ("LYMPH#", ">", 4.0), "Monocytosis": ("MONO#", ">", 1.0),
    "Eosinophilia": ("EO#", ">", 0.7), "Basophilia": ("BASO#", ">", 0.2), "Leukocytopenia": ("WBC", "<", 2.5),
    "Leukocytosis": ("WBC", ">", 18.0), "NRBC Present": ("NRBC%", ">", 2.0), "IG Present": ("IG#", ">", 0.1),
    "RBC Abn Distribution": ("RDW-CV", ">", 22), "Dimorphic Population": ("RDW-SD", ">", 70),
    "Anisocytosis": ("RDW-SD", ">", 65), "Microcytosis": ("MCV", "<", 70), "Macrocytosis": ("MCV", ">", 110),
    "Hypochromia": ("MCHC", "<", 29), "Anemia": ("HGB", "<", 10), "Erythrocytosis": ("RBC", ">", 6.5),
    "RET Abn Scattergram": ("RET%", ">", 4), "Reticulocytosis": ("RET%", ">", 3),
    "PLT Abn Distribution": ("MPV", ">", 13), "Thrombocytopenia": ("PLT", "<", 60), "Thrombocytosis": ("PLT", ">", 600),
    "PLT Abn Scattergram": ("IPF", ">", 25), "Blasts/Abn Lympho?": ("[HFLC%]", ">", 1.2), "Blasts?": ("MONO%", ">", 25),
    "Abn Lympho?": ("LYMPH%", ">", 60), "Left Shift?": ("IG%", ">", 5), "Atypical Lympho?": ("[HFLC%]", ">", 2.0),
    "Iron Deficiency?": ("[HYPO-He]", ">", 8), "HGB Defect?": ("[MicroR]", ">", 12), "Fragments?": ("[FRC%]", ">", 0.4),
}  # fmt: skip


def flags(values: Measured) -> dict[str, set[str]]:
    """The messages raised, by group."""
    raised = {
        name
        for name, (value, side, threshold) in RULES.items()
        if (values[value] > threshold if side == ">" else values[value] < threshold)
    }
    return {group: raised.intersection(names) for group, names in FLAG_GROUPS.items()}


def q_flag(name: str, values: Measured, rng: np.random.Generator) -> int:
    """A suspicion from 0 to 300 in steps of 10; the analyser suspects from 100 on."""
    if name not in RULES:
        return 10 * int(rng.integers(0, 6))
    value, side, threshold = RULES[name]
    ratio = values[value] / threshold if side == ">" else threshold / max(values[value], 1e-6)
    return 10 * round(min(max(100 * ratio + rng.normal(0, 5), 100 if ratio > 1 else 0), 300 if ratio > 1 else 90) / 10)
