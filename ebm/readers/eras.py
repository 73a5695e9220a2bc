"""The eras of CMS data taking: their runs, and the medium b-tagging working point of each tagger in them.

Medium: 1% of light jets pass. 2016, 2017 and 2018 are the reconstructions before the Ultra-Legacy one (UL).

Working points: recommendations of the b-tagging group (BTV) for each reconstruction. 2015: BtagRecommendation76X, as in
piedraj/AnalysisCMS. 2016 to 2018: 2016Legacy (CSVV2: 80XReReco), 94X and 102X, as in
hh-italian-group/h-tautau. UL: 106XUL16preVFP to 106XUL18, as in uhh-cms/hh2bbtautau. 2022 and 2023: btagging.json of
Summer22 to Summer23BPix, as in cms-btv-pog/BTVNanoCommissioning. 2024: that of Summer24, as in uhh-cms/mttbar.

Runs: from the first to the last certified one, as in the names of the golden JSON files (for 2016, Cert_271036-284044);
2022EE begins with era E, 2023BPix with era D. Of 2016, run 278769 and those from 278801 on were taken with the changed
feedback voltage of the tracker preamplifiers (VFP), as in the UL correction of missing momentum METXYCorr_Met_MetPhi.
"""

from __future__ import annotations

from bisect import bisect_right

TAGGERS = ("UParTAK4B", "PNetB", "DeepFlavB", "DeepB", "CSVV2")  # the first that a file and its era have is taken
MEDIUM = {
    "2015": {"CSVV2": 0.8},
    "2016": {"DeepFlavB": 0.3093, "DeepB": 0.6321, "CSVV2": 0.8484},
    "2017": {"DeepFlavB": 0.3033, "DeepB": 0.4941, "CSVV2": 0.8838},
    "2018": {"DeepFlavB": 0.2770, "DeepB": 0.4184},
    "UL2016preVFP": {"DeepFlavB": 0.2598, "DeepB": 0.6001},
    "UL2016postVFP": {"DeepFlavB": 0.2489, "DeepB": 0.5847},
    "UL2017": {"DeepFlavB": 0.3040, "DeepB": 0.4506},
    "UL2018": {"DeepFlavB": 0.2783, "DeepB": 0.4168},
    "2022": {"PNetB": 0.245, "DeepFlavB": 0.3086},
    "2022EE": {"PNetB": 0.2605, "DeepFlavB": 0.3196},
    "2023": {"PNetB": 0.1917, "DeepFlavB": 0.2431},
    "2023BPix": {"PNetB": 0.1919, "DeepFlavB": 0.2435},
    "2024": {"UParTAK4B": 0.1272},
}
_FIRST_RUNS = (
    (0, None), (246908, "2015"), (260628, None),
    (271036, "2016preVFP"), (278769, "2016postVFP"), (278770, "2016preVFP"), (278801, "2016postVFP"), (284045, None),
    (294927, "2017"), (306463, None), (314472, "2018"), (325176, None),
    (355100, "2022"), (359022, "2022EE"), (362761, None), (366442, "2023"), (369803, "2023BPix"), (370791, None),
    (378981, "2024"), (386952, None),
)  # fmt: skip


def era_of_run(run: int, ultra_legacy: bool) -> str | None:
    """The era in which a run was taken, None outside the certified runs of each year."""
    era = _FIRST_RUNS[bisect_right(_FIRST_RUNS, run, key=lambda entry: entry[0]) - 1][1]
    if era is None or era[:4] not in ("2016", "2017", "2018"):
        return era
    return f"UL{era}" if ultra_legacy else era[:4]
