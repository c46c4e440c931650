"""The node's own network: a bridge that pods hang on, and how all of it goes again."""

from __future__ import annotations

import json
import subprocess
from ipaddress import ip_network
from pathlib import Path

BRIDGE = "finetune0"
NODE_ADDRESS = "10.244.0.1"
"""Of the bridge: pods, kubelet and API server all reach it, and loopback they would not."""
POD_NETWORK = "10.244.0.0/24"
SERVICE_NETWORK = "10.96.0.0/16"
FIRST_SERVICE = "10.96.0.1"
"""Of the API server."""
RULES = ("KUBE-", "CNI-", POD_NETWORK)
"""What our rules and chains have in them: kube-proxy's, the network plugins', and those below."""
PLUGINS = Path("/usr/lib/cni")
SETTINGS = {"net.ipv4.ip_forward": "1", "net.bridge.bridge-nf-call-iptables": "1"}
"""Without them a Service's address leads nowhere."""


def has_bridge() -> bool:
    """Whether the bridge is there."""
    return subprocess.run(["ip", "link", "show", BRIDGE], capture_output=True).returncode == 0


def routes_to_ours() -> list[str]:
    """Networks that this machine reaches by other routes than the default one, and that ours would hide."""
    routes = json.loads(run("ip", "-4", "-json", "route"))
    found = [ip_network(route["dst"], strict=False) for route in routes if route["dst"] != "default"]
    ours = [ip_network(name) for name in (POD_NETWORK, SERVICE_NETWORK)]
    return [str(network) for network in found if any(network.overlaps(own) for own in ours)]


def create_bridge() -> None:
    """The bridge, with the node's address."""
    if not has_bridge():
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{NODE_ADDRESS}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
    # Where it is a module, which nobody has loaded so far.
    subprocess.run(["modprobe", "br_netfilter"], capture_output=True)
    for name, value in SETTINGS.items():
        (Path("/proc/sys") / name.replace(".", "/")).write_text(value)

    # Firewalls and container engines drop by default what is forwarded, or comes in.
    for chain, end in (("FORWARD", "--source"), ("FORWARD", "--destination"), ("INPUT", "--source")):
        run("iptables", "--insert", chain, end, POD_NETWORK, "--jump", "ACCEPT")


def write_network_configuration(folder: Path) -> None:
    """How containerd connects a pod."""
    folder.mkdir(parents=True, exist_ok=True)
    addresses = {"type": "host-local", "ranges": [[{"subnet": POD_NETWORK}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipMasq": True, "hairpinMode": True}
    # Addresses are kept beside it, so that a run does not begin with those of the last one.
    plugins = [{**bridge, "ipam": {**addresses, "dataDir": str(folder / "addresses")}}, {"type": "loopback"}]
    content = {"cniVersion": "1.0.0", "name": "finetune", "plugins": plugins}
    (folder / "10-bridge.conflist").write_text(json.dumps(content))


def remove_bridge() -> None:
    """Take the bridge away; its interfaces went with the pods."""
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)


def remove_rules() -> None:
    """Take our rules and chains away."""
    for program in ("iptables", "ip6tables"):
        saved = run(f"{program}-save")
        kept = [line for line in saved.splitlines() if not any(word in line for word in RULES)]
        if len(kept) < len(saved.splitlines()):
            subprocess.run([f"{program}-restore"], input="\n".join(kept) + "\n", text=True, check=True)


def unmount_below(folder: Path) -> None:
    """Let go of every file system that was mounted below `folder`, the innermost first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((found for found in mounts if found.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount.replace("\\040", " ")], capture_output=True)


def run(*command: str | Path) -> str:
    """Output of a command.

    Raises:
        RuntimeError: it failed; the text is what it said.
    """
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")
    return done.stdout
