# shellcheck shell=bash disable=SC2034,SC2153 # variables shared with the other files
# The rig's sshd and the aliases for it. Each alias has one temper: a port of the
# remote host that behaves badly, or options of the client that do.

P_NOFORWARD=2201 P_PERMITOPEN=2202 P_ONESESSION=2203 P_NOISY=2204 P_NODOCKER=2205
P_DENIED=2206 P_WRONGCTX=2207 P_SILENT=2208 P_REFUSED=2209 P_NOSOCKETS=2210
P_FEWSESSIONS=2211 P_DEFAULTS=2212

# ssh_files writes keys, configurations and the wrapper; sets SSHD.
ssh_files() {
	local k pam=no
	SSHD=$(command -v sshd)
	mkdir -p /run/sshd "$DIR/bin" "$DIR/nodocker"
	for k in host_key other_host_key key bad_key; do
		ssh-keygen -q -t ed25519 -N '' -C "$k" -f "$DIR/$k"
	done
	cp "$DIR/key.pub" "$DIR/authorized_keys"
	printf '%s %s\n' "$NS" "$(<"$DIR/host_key.pub")" >"$DIR/known_hosts"
	printf '%s %s\n' "$NS" "$(<"$DIR/other_host_key.pub")" >"$DIR/known_hosts.changed"
	ln -s /bin/* "$DIR/nodocker/"
	rm -f "$DIR"/nodocker/{docker,podman}
	# Without PAM sshd refuses an account whose password is locked.
	[[ $(getent shadow root | cut -d: -f2) == '!'* ]] && pam=yes

	printf '#!/bin/sh\nexec %q -F %q "$@"\n' "$(real_ssh)" "$DIR/ssh_config" >"$DIR/bin/ssh"
	cat >"$DIR/remote" <<-END
	#!/bin/sh
	# The login of an alias with a temper: remote TEMPER.
	case \$1 in
	noisy)
		printf 'Welcome to %s!\r\n\033[1mHTTP/1.1 200 OK\033[0m\r\n\r\n{"Id":"noise"}\n' '$NS'
		echo 'noise: stderr of a start-up file' >&2
		printf 'noise without an end of line: ' ;;
	nodocker) PATH=$DIR/nodocker ;;
	denied) HOME=/nonexistent as='setpriv --reuid 65534 --regid 65534 --clear-groups' ;;
	esac
	export HOME PATH
	exec \$as "\${SHELL:-/bin/sh}" -c "\${SSH_ORIGINAL_COMMAND:-exec \$SHELL}"
	END
	chmod 755 "$DIR/bin/ssh" "$DIR/remote"

	# With SHLVL=1 bash does not read this machine's .bashrc, which can take long or hang.
	cat >"$DIR/sshd_config" <<-END
	$(printf 'Port %s\n' 22 $P_NOFORWARD $P_PERMITOPEN $P_ONESESSION $P_NOISY $P_NODOCKER $P_DENIED $P_WRONGCTX \
		$P_NOSOCKETS $P_FEWSESSIONS)
	ListenAddress $ADDR
	HostKey $DIR/host_key
	AuthorizedKeysFile $DIR/authorized_keys
	PidFile none
	UsePAM $pam
	StrictModes no
	PermitRootLogin prohibit-password
	PasswordAuthentication no
	KbdInteractiveAuthentication no
	PermitUserRC no
	PrintMotd no
	UseDNS no
	MaxStartups 100
	LogLevel VERBOSE
	SetEnv SHLVL=1 DOCKER_HOST=unix://$DIR/docker.sock
	Match LocalPort $P_NOFORWARD
		AllowTcpForwarding no
	Match LocalPort $P_PERMITOPEN
		PermitOpen 127.0.0.1:18080
	Match LocalPort $P_ONESESSION
		MaxSessions 1
	Match LocalPort $P_NOISY
		ForceCommand $DIR/remote noisy
	Match LocalPort $P_NODOCKER
		ForceCommand $DIR/remote nodocker
	Match LocalPort $P_DENIED
		ForceCommand $DIR/remote denied
	Match LocalPort $P_WRONGCTX
		SetEnv SHLVL=1 DOCKER_HOST=unix://$DIR/missing.sock
	Match LocalPort $P_NOSOCKETS
		AllowStreamLocalForwarding no
	Match LocalPort $P_FEWSESSIONS
		AllowStreamLocalForwarding no
		MaxSessions 4
	END

	cat >"$DIR/ssh_config" <<-END
	Host $NS-noforward
		Port $P_NOFORWARD
	Host $NS-permitopen
		Port $P_PERMITOPEN
	Host $NS-onesession
		Port $P_ONESESSION
	Host $NS-noisy
		Port $P_NOISY
	Host $NS-nodocker
		Port $P_NODOCKER
	Host $NS-denied
		Port $P_DENIED
	Host $NS-wrongctx
		Port $P_WRONGCTX
	Host $NS-nosockets
		Port $P_NOSOCKETS
	Host $NS-fewsessions
		Port $P_FEWSESSIONS
	Host $NS-defaults
		Port $P_DEFAULTS
	Host $NS-silent
		Port $P_SILENT
	Host $NS-refused
		Port $P_REFUSED
	Host $NS-unresolvable
		HostName rdhpf.invalid
	Host $NS-badkey
		IdentityFile $DIR/bad_key
	Host $NS-changedkey
		UserKnownHostsFile $DIR/known_hosts.changed
	Host $NS-delay
		ProxyCommand $DIR/server delay %h %p 25ms
	Host $NS-hostile
		ControlMaster auto
		ControlPath $DIR/hostile-%C
		ControlPersist yes
		ForkAfterAuthentication yes
		RemoteCommand echo hostile
		RequestTTY force
		LocalForward 127.0.0.1:$((23000 + INDEX)) 127.0.0.1:22
		ExitOnForwardFailure yes
		PermitLocalCommand yes
		LocalCommand touch $DIR/hostile-local-command
		VisualHostKey yes
		LogLevel QUIET
	Host * !$NS-badkey
		IdentityFile $DIR/key
	Host *
		HostName $ADDR
		HostKeyAlias $NS
		User root
		IdentitiesOnly yes
		IdentityAgent none
		UserKnownHostsFile $DIR/known_hosts
		GlobalKnownHostsFile /dev/null
		StrictHostKeyChecking yes
		UpdateHostKeys no
	END
}

# real_ssh prints the path of OpenSSH's client, never that of a rig's wrapper.
real_ssh() { type -aP ssh | grep -v "^$PREFIX" | head -n 1; }
