# shellcheck shell=bash
# rig install: the packages a rig needs, and what some tests use besides.

EXTRA=(podman systemd-analyze tmux zsh fish)

cmd_install() {
	local missing pkgs=() t policy=/usr/sbin/policy-rc.d
	missing=$(missing_tools "${EXTRA[@]}")
	if [[ -z $missing ]]; then
		say "nothing is missing"
		return
	fi
	[[ $EUID == 0 ]] || die "missing: ${missing}(installing needs root)"
	if [[ ! -f /etc/debian_version ]] || ! command -v apt-get >/dev/null; then
		die "missing: ${missing}(this is no Debian: install them by its own means)"
	fi
	for t in $missing; do
		case $t in
		cc) pkgs+=(gcc libc6-dev) ;; # for go test -race
		sshd) pkgs+=(openssh-server) ;;
		ssh | ssh-keygen) pkgs+=(openssh-client) ;;
		dockerd | containerd | runc) pkgs+=(docker.io) ;;
		docker) # a package of its own since Debian 13
			pkgs+=(docker.io)
			apt-cache show docker-cli >/dev/null 2>&1 && pkgs+=(docker-cli) ;;
		docker-compose) pkgs+=(docker-compose python3-paramiko) ;; # the latter for ssh://
		ip) pkgs+=(iproute2) ;;
		nsenter | setpriv) pkgs+=(util-linux) ;;
		nc) pkgs+=(netcat-openbsd) ;;
		ps) pkgs+=(procps) ;;
		systemd-analyze) pkgs+=(systemd) ;;
		*) pkgs+=("$t") ;;
		esac
	done
	say "installing ${pkgs[*]}"
	# Without this Debian would start the services of what it installs.
	if [[ ! -e $policy ]]; then
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
		trap 'rm -f /usr/sbin/policy-rc.d' EXIT
	fi
	local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
	if ! apt-cache show "${pkgs[@]}" >/dev/null 2>&1 ||
		! "${apt[@]}" install -y --no-install-recommends "${pkgs[@]}" >&2; then
		"${apt[@]}" update >&2
		"${apt[@]}" install -y --no-install-recommends "${pkgs[@]}" >&2
	fi
	hash -r
	missing=$(missing_tools "${EXTRA[@]}")
	[[ -z $missing ]] || die "still missing: $missing"
}
