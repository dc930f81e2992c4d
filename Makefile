# What people and CI run. The rig is a disposable remote Docker host, see e2e/rig/README.md.

.PHONY: build test demo bench faults soak fuzz

build:
	go build -trimpath -o rdhpf .

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
