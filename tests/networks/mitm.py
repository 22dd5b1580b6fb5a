"""The script of the inspecting proxy of networks.py. The name of a file says what happens to its answers."""
import os
import pathlib


def requestheaders(flow):
    if "strip-range" in flow.request.path:
        if flow.request.headers.pop("Range", None):
            pathlib.Path(os.environ["NETWORKS_STRIPPED"]).touch()
        flow.request.headers.pop("If-Range", None)


def response(flow):
    if flow.request.method != "GET" or flow.response.status_code not in (200, 206):
        return
    if "compress" in flow.request.path:
        flow.response.encode("gzip")
    if "login" in flow.request.path:
        flow.response.status_code = 200
        flow.response.headers.clear()
        flow.response.headers["Content-Type"] = "text/html"
        flow.response.text = "<html><head><title>Sign in</title></head><body>to the network</body></html>"
