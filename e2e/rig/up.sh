# shellcheck shell=bash disable=SC2153,SC2034 # variables shared with the other files
# rig up: namespace, engine, sshd, image; and the watcher of its owner.

cmd_up() {
	local owner='' nodes=1 t0=$SECONDS missing
	while (($#)); do
		case $1 in
		-owner)
			owner=${2:-}
			[[ $owner =~ ^[0-9]+$ ]] || usage
			alive "$owner" || die "-owner: no process $owner"
			shift ;;
		-nodes)
			nodes=${2:-}
			[[ $nodes == [12] ]] || usage
			shift ;;
		-*) usage ;;
		*) break ;;
		esac
		shift
	done
	(($# <= 1)) || usage
	use "${1:-rig}"
	need_root
	missing=$(missing_tools)
	[[ -z $missing ]] || die "missing: ${missing}(rig install installs them)"
	command -v go >/dev/null || die "missing: go, to build the image"
	lock
	# Not after a reboot, which leaves the directory and nothing else.
	if [[ -f $DIR/env && /proc/$(<"$DIR/sshd.pid")/ns/net -ef /run/netns/$NS ]]; then
		[[ $nodes == 1 || -f $DIR/dockerd2.pid ]] || die "$NAME is up with one node; take it down first"
		cat "$DIR/env"
		return
	fi
	down_locked
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	trap 'up_failed $?' EXIT
	mkdir -m 755 "$DIR"
	if [[ -n $owner ]]; then
		setsid "$SELF" _watch "$NAME" "$owner" "$(start_time "$owner")" </dev/null >/dev/null 2>&1 9>&- &
		echo $! >"$DIR/watch.pid"
	fi

	build </dev/null >"$DIR/build.log" 2>&1 9>&- &
	local build_pid=$!
	network
	start_dockerd ''
	ssh_files
	local sshd_opts=(-D -f "$DIR/sshd_config" -E "$DIR/sshd.log")
	# Newer servers punish a source for failed logins, which are on purpose here.
	if "$SSHD" -t "${sshd_opts[@]}" -o PerSourcePenalties=no >/dev/null 2>&1; then
		sshd_opts+=(-o PerSourcePenalties=no)
	fi
	spawn sshd "$DIR/sshd.out" "$SSHD" "${sshd_opts[@]}"
	# MaxStartups cannot differ by port: its defaults need a server of their own.
	spawn sshd-defaults "$DIR/sshd.out" "$SSHD" -p "$P_DEFAULTS" -o MaxStartups=10:30:100 \
		-o MaxSessions=10 "${sshd_opts[@]}" -E "$DIR/sshd-defaults.log"
	wait "$build_pid" || die "building the server failed"
	spawn silent "$DIR/silent.log" "$DIR/server" -mode discard -listen "$P_SILENT"
	wait_for 20 sshd "$(<"$DIR/sshd.pid")" port_open "$ADDR" 22
	wait_for 20 sshd-defaults "$(<"$DIR/sshd-defaults.pid")" port_open "$ADDR" "$P_DEFAULTS"
	wait_for 20 "silent listener" "$(<"$DIR/silent.pid")" port_open "$ADDR" "$P_SILENT"
	wait_for 60 dockerd "$(<"$DIR/dockerd.pid")" docker_ready
	tar -C "$DIR" -c server |
		rig_docker import -c 'ENTRYPOINT ["/server"]' -c 'EXPOSE 80' - "$IMAGE" >/dev/null ||
		die "importing the image failed"
	timeout 20 "$DIR/bin/ssh" -o BatchMode=yes "$NS" docker version >"$DIR/check.log" 2>&1 ||
		die "ssh $NS docker version failed"
	[[ $nodes == 1 ]] || second_node
	[[ -z $owner ]] || alive "$owner" || die "its owner, process $owner, has ended"
	write_env
	trap - EXIT INT TERM HUP
	say "$NAME is up at $ADDR after $((SECONDS - t0)) s"
	cat "$DIR/env"
}

up_failed() {
	local log
	trap '' INT TERM HUP
	[[ $1 == 0 ]] && return
	jobs -p | xargs -r kill 2>/dev/null || true
	disown -a # or bash reports how each of them ended
	for log in "$DIR"/*.log "$DIR"/*.out; do
		[[ -s $log ]] && { say "the end of ${log##*/}:"; tail -n 15 "$log" | sed 's/^/    /' >&2; }
	done
	say "up failed, taking $NAME down"
	down_locked
	unlock
}

build() {
	cd "$HERE/server" || return
	env -u GOARCH GOOS=linux CGO_ENABLED=0 GOFLAGS= GOWORK=off GOTOOLCHAIN=local \
		go build -trimpath -ldflags=-s -o "$DIR/server.new" main.go
	mv "$DIR/server.new" "$DIR/server"
}

# network makes the namespace and the first pair of links whose number is free;
# the number gives the /30 out of 10.97.0.0/16, or of 198.18.0.0/16 if this machine
# routes the former elsewhere. Sets ADDR, INDEX and NEAR.
network() {
	local index=0
	[[ -z $(routes match "10.97.0.0/16") ]] || BASE=198.18
	exec 8<"$LOCKS"
	flock 8
	while [[ -e /sys/class/net/rdhpf$index ]] || [[ -n $(routes root "$(subnet $index 0)/30"; routes match "$(subnet $index 0)/30") ]]; do
		index=$((index + 1))
		((index < 16384)) || die "no subnet is free in $BASE.0.0/16"
	done
	INDEX=$index NEAR=$(subnet "$index" 1) ADDR=$(subnet "$index" 2)
	echo "$INDEX" >"$DIR/index"
	ip netns add "$NS"
	ip link add "rdhpf$index" type veth peer name eth0 netns "$NS"
	ip addr add "$NEAR/30" dev "rdhpf$index"
	exec 8>&-
	ip link set "rdhpf$index" up
	ip -n "$NS" addr add "$ADDR/30" dev eth0
	ip -n "$NS" link set lo up
	ip -n "$NS" link set eth0 up
}

BASE=10.97
subnet() { echo "$BASE.$(($1 / 64)).$(($1 % 64 * 4 + $2))"; }

# routes KIND SUBNET prints the routes within (root) or around (match) a subnet.
routes() { ip -4 route show "$1" "$2" | grep -v '^default' || true; }

# spawn NAME LOG COMMAND... runs a daemon of the rig inside a namespace, and
# leaves its pid in NAME.pid. nsenter, as `ip netns exec` would hide the cgroups.
spawn() {
	local name=$1 log=$2
	shift 2
	setsid nsenter --net="/run/netns/${IN:-$NS}" "$@" </dev/null >>"$log" 2>&1 9>&- &
	echo $! >"$DIR/$name.pid"
}

# start_dockerd '' | 2 starts the first or the second engine, as node1 or node2.
start_dockerd() {
	local in=$NS
	[[ -z $1 ]] || in=$NS.2
	echo '{}' >"$DIR/daemon.json"
	rm -f "$DIR/docker$1.sock"
	IN=$in spawn "dockerd$1" "$DIR/dockerd$1.log" \
		unshare --uts sh -c 'echo "$0" >/proc/sys/kernel/hostname; exec "$@"' "node${1:-1}" \
		env -u DOCKER_HOST TMPDIR="$DIR" dockerd \
		--config-file "$DIR/daemon.json" --data-root "$DIR/data$1" --exec-root "$DIR/exec$1" \
		-H "unix://$DIR/docker$1.sock" --pidfile "$DIR/engine$1.pid" --storage-driver vfs \
		--exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "/rdhpf-rig-$NAME" --log-level warn
}

# second_node adds a worker, with an engine in a namespace of its own that only
# the first one reaches, and makes the two a Swarm.
ADDR1=192.0.2.1 ADDR2=192.0.2.2
second_node() {
	local token
	ip netns add "$NS.2"
	ip link add node2 netns "$NS" type veth peer name eth0 netns "$NS.2"
	ip -n "$NS" addr add "$ADDR1/30" dev node2
	ip -n "$NS" link set node2 up
	ip -n "$NS.2" addr add "$ADDR2/30" dev eth0
	ip -n "$NS.2" link set lo up
	ip -n "$NS.2" link set eth0 up
	start_dockerd 2
	wait_for 60 dockerd2 "$(<"$DIR/dockerd2.pid")" docker_ready 2
	rig_docker save "$IMAGE" | rig_docker2 load >/dev/null || die "copying the image failed"
	rig_docker swarm init --advertise-addr "$ADDR1" >/dev/null || die "docker swarm init failed"
	token=$(rig_docker swarm join-token -q worker)
	rig_docker2 swarm join --advertise-addr "$ADDR2" --token "$token" "$ADDR1:2377" >/dev/null || die "docker swarm join failed"
}

write_env() {
	cat >"$DIR/env.new" <<-END
	RIG_NAME=$NAME
	RIG_DIR=$DIR
	RIG_NS=$NS
	RIG_HOST=$NS
	RIG_ADDR=$ADDR
	RIG_NEAR_ADDR=$NEAR
	RIG_DOCKER=$DIR/docker.sock
	RIG_BIN=$DIR/bin
	RIG_SSH_CONFIG=$DIR/ssh_config
	RIG_VETH=eth0
	RIG_NEAR_VETH=rdhpf$INDEX
	RIG_HOSTILE_PORT=$((23000 + INDEX))
	RIG_IMAGE=$IMAGE
	RIG_SSHD_PID=$(<"$DIR/sshd.pid")
	RIG_PIDS=$(cat "$DIR"/{sshd,dockerd,silent,sshd-defaults}.pid | paste -sd,)
	END
	[[ $nodes == 1 ]] || cat >>"$DIR/env.new" <<-END
	RIG_NS2=$NS.2
	RIG_ADDR2=$ADDR2
	RIG_DOCKER2=$DIR/docker2.sock
	END
	mv "$DIR/env.new" "$DIR/env"
}

# cmd_watch NAME PID START takes the rig down when the process has ended.
cmd_watch() {
	use "$1"
	while [[ $(start_time "$2") == "$3" ]]; do sleep 0.3; done
	cmd_down "$NAME"
}
