"""A reward server for `--reward-url`, with nothing but the standard library.

python docs/reward_server.py [PORT, 8000]
python -m perl reinforce --reward-url http://127.0.0.1:8000/ ...
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reward(prompt, completion: str) -> float:
    """Yours: a model, unit tests, a judge. `prompt` is as in the data, text or messages."""
    return -abs(len(completion.split()) - 10) / 10


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rewards = list(map(reward, asked["prompts"], asked["completions"]))
        answer = json.dumps({"rewards": rewards}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
