#!/bin/sh
# Installs what start_slurm.sh starts, where it is missing: Debian's slurm-wlm and munge. Needs root and apt.
set -eu

complete() { for program in munged slurmctld slurmd sbatch srun scontrol; do command -v $program >/dev/null || return 1; done; }
refuse() {
    echo "error: the Slurm tests need slurmctld, slurmd and munged, and $1." >&2
    echo "On Debian or Ubuntu, as root: apt-get install slurm-wlm munge" >&2
    exit 2
}

complete && exit 0
[ "$(id -u)" -eq 0 ] || refuse "only root can install them"
command -v apt-get >/dev/null || refuse "there is no apt-get here"

# The packages would start the daemons as services of this machine; the tests start their own.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
echo "installing slurm-wlm and munge"
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null; }
install || { apt-get update -qq && install; } || refuse "apt-get could not install them"
complete || refuse "they are not all there after the installation"
