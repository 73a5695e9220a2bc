"""Score events over HTTP: python examples/client/score.py http://127.0.0.1:8000"""

import json
import sys
from urllib.request import Request, urlopen

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def post(path: str, document: dict) -> dict:
    headers = {"Content-Type": "application/json"}  # and "Authorization": "Bearer KEY" where the service has keys
    with urlopen(Request(URL + path, json.dumps(document).encode(), headers), timeout=5) as answer:
        return json.load(answer)


names = json.load(urlopen(f"{URL}/api/v1/model", timeout=5))["feature_names"]
event = dict.fromkeys(names) | {"MET": 812.0, "ht": 240.0, "n_jets": 2, "n_btag": 1, "n_lep": 0}
missing = ("met_over_sqrt_ht", "dphi_min", "mht", "meff", "mvis", "sphericity", "aplanarity", "sphericity_t", "c_lin",
           "thrust_t", "centrality")
event |= dict.fromkeys(missing, 0.0)  # always measured; objects that the event has not stay None
print(json.dumps(post("/api/v1/score", {"events": [list(event.values())]})))
print(json.dumps(post("/api/v1/explain", {"event": list(event.values())})))
