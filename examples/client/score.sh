#!/bin/sh
# Score events over HTTP: sh examples/client/score.sh http://127.0.0.1:8000
url=${1:-http://127.0.0.1:8000}
# 64 features: none of ten objects, sixteen of the event, eight of jets.
event="$(printf 'null,%.0s' $(seq 40)) 812, 52.4, 0, 240, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, $(printf 'null,%.0s' $(seq 7)) null"
curl -fsS -H 'Content-Type: application/json' -d "{\"events\": [[$event]]}" "$url/api/v1/score" && echo
curl -fsS -H 'Content-Type: application/json' -d "{\"event\": [$event]}" "$url/api/v1/explain" && echo
