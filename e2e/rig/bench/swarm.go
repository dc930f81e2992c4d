//go:build linux

package main

// swarm.go: a Swarm larger than any rig: an engine that lists one and runs nothing.

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

type object = map[string]any

// fakeManager serves the lists of a manager on a socket. A fifth of the services have their
// only task publish its port on its node. Nobody is to be probed.
func (b *bench) fakeManager(services, nodes int) (path string, ports map[int]bool, stop func(), err error) {
	id := func(kind string, n int) string { return fmt.Sprintf("%s%024d", kind, n) }
	filler := object{"Env": []string{strings.Repeat("x", 500)}} // services and nodes take 1 to 2 KB each
	var allServices, allNodes, allTasks []object
	ports = map[int]bool{}
	for n := range nodes {
		allNodes = append(allNodes, object{"ID": id("n", n), "Description": object{"Hostname": fmt.Sprintf("node%d", n), "More": filler},
			"Status": object{"State": "ready", "Addr": fmt.Sprintf("198.51.100.%d", n+1)}})
	}
	for n := range services {
		port, mode := b.base+200+n, "ingress"
		if n%5 == 0 {
			mode = "host"
		}
		published := []object{{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": port, "PublishMode": mode}}
		spec := object{"ContainerSpec": object{"Image": "image", "Labels": object{"rdhpf.probe": "false"}, "More": filler}}
		ports[port] = true
		allServices = append(allServices, object{"ID": id("s", n), "Spec": object{"Name": fmt.Sprintf("service%d", n), "TaskTemplate": spec},
			"Endpoint": object{"Ports": published}})
		task := object{"ID": id("t", n), "ServiceID": id("s", n), "NodeID": id("n", 1+n%(nodes-1)), "Slot": 1, "Spec": spec,
			"Status": object{"State": "running", "ContainerStatus": object{"ContainerID": fmt.Sprintf("%064x", n)}}}
		if mode == "host" {
			task["Status"].(object)["PortStatus"] = object{"Ports": published}
		}
		allTasks = append(allTasks, task)
	}
	mux := http.NewServeMux()
	for at, what := range map[string]any{"/_ping": "OK", "/containers/json": []object{}, "/services": allServices, "/nodes": allNodes,
		"/tasks": allTasks, "/info": object{"Swarm": object{"NodeID": id("n", 0)}}} {
		body, err := json.Marshal(what)
		if err != nil {
			return "", nil, nil, err
		}
		mux.HandleFunc(at, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Server", "Docker/bench (linux)")
			w.Write(body)
		})
	}
	mux.HandleFunc("/events", func(w http.ResponseWriter, req *http.Request) {
		w.(http.Flusher).Flush()
		<-req.Context().Done()
	})
	path = b.tmp + "/manager.sock"
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", nil, nil, err
	}
	server := &http.Server{Handler: mux}
	go server.Serve(l)
	return path, ports, func() { server.Close(); os.Remove(path) }, nil
}

func (b *bench) swarm() ([]row, error) {
	path, ports, stop, err := b.fakeManager(1000, 200)
	if err != nil {
		return nil, err
	}
	defer stop()
	const what = "Swarm of 1,000 services and 200 nodes, "
	var took, cold samples
	var idle memory
	var status row
	var used time.Duration
	const watched = 10 * time.Second
	for range b.times(3) {
		began := time.Now()
		f, err := b.run("ssh://" + b.env["RIG_HOST"] + path)
		if err != nil {
			return nil, err
		}
		opened, err := b.allListen(f, ports)
		if err == nil {
			err = f.allActive()
		}
		if err == nil {
			status, err = f.statusCost(what+"status", 6)
		}
		var before time.Duration
		if err == nil {
			before, err = cpuOf(f.cmd.Process.Pid)
		}
		if err == nil {
			time.Sleep(watched)
			used, err = cpuOf(f.cmd.Process.Pid)
		}
		used -= before
		if err == nil {
			idle, err = f.memory()
		}
		connected := f.connected
		f.stop()
		if err != nil {
			return nil, f.explain(err)
		}
		took.add(opened.Sub(connected))
		cold.add(opened.Sub(began))
	}
	open := durations(what+"list taken → all open", took, ms(cold.median())+" (since the process started)", "", took.median(), 60*time.Millisecond)
	open.note = "A stand-in for a manager, behind which nothing answers."
	share := 100 * float64(used) / float64(watched)
	return []row{open, {figure: what + "memory with its ssh", n: 1, median: mib(idle.rss) + " RSS", reference: mib(idle.pss) + " PSS", goal: "(shown)", met: true},
		{figure: what + "CPU, listed every second", n: 1, median: fmt.Sprintf("%.1f %%", share), goal: "(shown)", met: true}, status}, nil
}
