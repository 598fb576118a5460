// A gateway's machine API with the structs of the real one: the fields as it types them, decoded by
// encoding/json, validated as it validates.  Prints one JSON line for each thing that happens; the
// figures in it are what Go made of them.  Ends when its standard input does.
//
//	go run strict_gateway.go TOKEN [lenient]
//
// lenient: as the real one, which ignores fields that it does not know and takes any private_ip.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
)

type registerRequest struct {
	Token        string `json:"token"`
	MachineID    string `json:"machine_id"`
	Hostname     string `json:"hostname"`
	ProviderName string `json:"provider_name"`
	PoolName     string `json:"pool_name"`
	Cpu          string `json:"cpu"`
	Memory       string `json:"memory"`
	GpuCount     string `json:"gpu_count"`
	PrivateIP    string `json:"private_ip"`
}

type machineMetrics struct {
	TotalCpuAvailable    int     `json:"total_cpu_available"`
	TotalMemoryAvailable int     `json:"total_memory_available"`
	TotalDiskSpaceBytes  int     `json:"total_disk_space_bytes"`
	TotalDiskFreeBytes   int     `json:"total_disk_free_bytes"`
	CpuUtilizationPct    float64 `json:"cpu_utilization_pct"`
	MemoryUtilizationPct float64 `json:"memory_utilization_pct"`
	WorkerCount          int     `json:"worker_count"`
	ContainerCount       int     `json:"container_count"`
	FreeGpuCount         int     `json:"free_gpu_count"`
	CacheUsagePct        float64 `json:"cache_usage_pct"`
	CacheCapacity        int     `json:"cache_capacity"`
	CacheMemoryUsage     int     `json:"cache_memory_usage"`
	CacheCpuUsage        float64 `json:"cache_cpu_usage"`
}

type inferenceStatus struct {
	Status string   `json:"status"`
	IP     string   `json:"ip"`
	Port   int      `json:"port"`
	Models []string `json:"models"`
}

type keepaliveRequest struct {
	MachineID    string           `json:"machine_id"`
	ProviderName string           `json:"provider_name"`
	PoolName     string           `json:"pool_name"`
	AgentVersion string           `json:"agent_version"`
	Metrics      *machineMetrics  `json:"metrics"`
	Inference    *inferenceStatus `json:"inference"`
}

var printing sync.Mutex

func tell(what string, fields map[string]any) {
	fields["what"] = what
	line, _ := json.Marshal(fields)
	printing.Lock()
	defer printing.Unlock()
	fmt.Println(string(line))
}

func fail(writer http.ResponseWriter, status int, message string) {
	tell("refused", map[string]any{"status": status, "message": message})
	writer.Header().Set("Content-Type", "application/json; charset=UTF-8")
	writer.WriteHeader(status)
	json.NewEncoder(writer).Encode(map[string]string{"message": message})
}

// parseCpu: millicores, digits with an optional m.
func parseCpu(text string) (int64, error) {
	return strconv.ParseInt(strings.TrimSuffix(text, "m"), 10, 64)
}

// parseMemory: MB, from digits with Ki, Mi or Gi.
func parseMemory(text string) (int64, error) {
	for suffix, factor := range map[string]float64{"Ki": 1.0 / 1024, "Mi": 1, "Gi": 1024} {
		if strings.HasSuffix(text, suffix) {
			number, err := strconv.ParseInt(strings.TrimSuffix(text, suffix), 10, 64)
			return int64(float64(number) * factor), err
		}
	}
	return 0, fmt.Errorf("no unit in %q", text)
}

// bind decodes; a field that is not known is an error too, so that a misspelt one shows.
func bind(writer http.ResponseWriter, request *http.Request, token string, into any) bool {
	if request.Header.Get("Authorization") != "Bearer "+token {
		fail(writer, 401, "Unauthorized")
		return false
	}
	if request.Method != "POST" || request.Header.Get("Content-Type") != "application/json" {
		fail(writer, 400, "Invalid payload")
		return false
	}
	body, err := io.ReadAll(request.Body)
	if err == nil {
		tell("raw", map[string]any{"path": request.URL.Path, "body": string(body)})
		decoder := json.NewDecoder(strings.NewReader(string(body)))
		if len(os.Args) < 3 {
			decoder.DisallowUnknownFields()
		}
		err = decoder.Decode(into)
	}
	if err != nil {
		tell("error", map[string]any{"error": err.Error()})
		fail(writer, 400, "Invalid payload")
		return false
	}
	return true
}

func main() {
	token := os.Args[1]
	pools := map[string]bool{"gpu": true}
	registered := map[string]bool{}
	mux := http.NewServeMux()
	mux.HandleFunc("/api/v1/machine/register", func(writer http.ResponseWriter, request *http.Request) {
		var body registerRequest
		if !bind(writer, request, token, &body) {
			return
		}
		cpu, cpuErr := parseCpu(body.Cpu)
		memory, memoryErr := parseMemory(body.Memory)
		gpus, gpuErr := strconv.ParseUint(body.GpuCount, 10, 32)
		switch {
		case !pools[body.PoolName]:
			fail(writer, 500, "Invalid pool name")
		case cpuErr != nil:
			fail(writer, 500, "Invalid machine cpu value")
		case memoryErr != nil:
			fail(writer, 500, "Invalid machine memory value")
		case gpuErr != nil:
			fail(writer, 500, "Invalid gpu count")
		case len(os.Args) < 3 && net.ParseIP(body.PrivateIP).To4() == nil:
			fail(writer, 500, "private_ip is no dotted quad")
		default:
			registered[body.MachineID] = true
			tell("registered", map[string]any{"request": body, "cpu_millicores": cpu,
				"memory_mb": memory, "gpus": gpus})
			writer.Header().Set("Content-Type", "application/json; charset=UTF-8")
			json.NewEncoder(writer).Encode(map[string]any{"config": nil, "machine_state": map[string]any{
				"machine_id": body.MachineID, "status": "registered", "pool_name": body.PoolName,
				"ttl_seconds": 300}})
		}
	})
	mux.HandleFunc("/api/v1/machine/keepalive", func(writer http.ResponseWriter, request *http.Request) {
		var body keepaliveRequest
		if !bind(writer, request, token, &body) {
			return
		}
		switch {
		case body.MachineID == "" || body.PoolName == "":
			fail(writer, 400, "machine_id and pool_name are required")
		case !registered[body.MachineID]:
			fail(writer, 500, "Failed to update keepalive: failed to get machine state <"+
				body.MachineID+">: machine not found")
		case body.Metrics == nil:
			fail(writer, 500, "Internal Server Error")
		case int(int32(body.Metrics.TotalMemoryAvailable)) != body.Metrics.TotalMemoryAvailable:
			fail(writer, 500, "total_memory_available does not fit the scheduler's int32")
		default:
			tell("ready", map[string]any{"request": body})
			writer.Header().Set("Content-Type", "application/json; charset=UTF-8")
			json.NewEncoder(writer).Encode(map[string]any{"status": "ok"})
		}
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	tell("listening", map[string]any{"port": listener.Addr().(*net.TCPAddr).Port})
	go http.Serve(listener, mux)
	io.Copy(io.Discard, os.Stdin)
}
