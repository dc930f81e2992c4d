# What people and CI run. The rig is a disposable remote Docker host, see e2e/rig/README.md.

.PHONY: build install uninstall dist test demo bench faults soak fuzz

build:
	go build -trimpath -buildvcs=auto -o rdhpf .

PREFIX = /usr/local

# It does not build again what is there: under sudo, go may be missing and git
# may refuse the checkout.
install:
	[ -x rdhpf ] || $(MAKE) build
	mkdir -p "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/systemd/user"
	install -m 755 rdhpf "$(DESTDIR)$(PREFIX)/bin/rdhpf"
	sed 's|/usr/local|$(PREFIX)|' contrib/rdhpf@.service >"$(DESTDIR)$(PREFIX)/share/systemd/user/rdhpf@.service"

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/rdhpf" "$(DESTDIR)$(PREFIX)/share/systemd/user/rdhpf@.service"

DIST = dist
TARGETS = linux/amd64 linux/arm64 darwin/amd64 darwin/arm64 freebsd/amd64 freebsd/arm64

# Archives of HEAD, with the same bytes each time. It takes GNU tar.
dist:
	@set -e; umask 022; tree=$$(mktemp -d); trap 'rm -rf "$$tree"' EXIT; \
	rm -rf "$(DIST)"; mkdir -p "$(DIST)"; \
	git archive HEAD | tar -x -C "$$tree"; \
	version=$$(git describe --tags --exact-match 2>/dev/null || echo "devel-$$(git rev-parse --short=12 HEAD)"); \
	for target in $(TARGETS); do \
		name=rdhpf-$$version-$${target%/*}-$${target#*/}; \
		mkdir "$$tree/$$name"; \
		cp -R "$$tree/LICENSE" "$$tree/README.md" "$$tree/contrib" "$$tree/$$name"; \
		CGO_ENABLED=0 GOOS=$${target%/*} GOARCH=$${target#*/} \
			go build -C "$$tree" -trimpath -buildvcs=false -ldflags='-s -w' -o "$$name/rdhpf" .; \
		tar -C "$$tree" --sort=name --mtime="@$$(git log -1 --format=%ct)" --owner=0 --group=0 --numeric-owner \
			--mode=u=rwX,go=rX -cf "$(DIST)/$$name.tar" "$$name"; \
		gzip -9n "$(DIST)/$$name.tar"; \
	done; \
	cd "$(DIST)"; sha256sum *.tar.gz | tee SHA256SUMS

# As root on Debian, what the tests need is installed first; elsewhere they say
# what they skip. -count=1: a rig is no input that the test cache knows of.
test:
	@e2e/rig/rig install || { [ -z "$$CI" ] && echo "tests that need the rig will be skipped"; }
	go vet ./...
	go test -race -count=1 -timeout 45m ./...

demo:
	@e2e/rig/rig install
	@e2e/rig/demo

bench:
	@e2e/rig/rig install
	go run ./e2e/rig/bench

# Every fault FAULTS times over (20), and how long rdhpf took to recover: what
# happened, how often, median, most. It takes an hour or three.
faults:
	@e2e/rig/rig install
	go test -race -count=$${FAULTS:-20} -timeout 12h -v ./e2e | grep -E '^(---|    ---|\||FAIL|ok)'

fuzz:
	@for f in $$(grep -ho 'func Fuzz[A-Za-z0-9]*' *_test.go | cut -d' ' -f2); do \
		go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $${FUZZTIME:-30s} . || exit 1; done

# RDHPF_SOAK=5m make soak is a shorter one, RDHPF_SOAK_SEED=N repeats one.
soak:
	@e2e/rig/rig install
	RDHPF_SOAK=$${RDHPF_SOAK:-20m} go test -race -count=1 -timeout 2h -run '^TestSoak$$' -v ./e2e
