// A worker: claims what fits, runs it, keeps its lease, finishes it; sleeps until a notification or a timer is due.
//
//	go run ./worker NAME        until SIGTERM, which puts back what is not done; a name that no other worker has
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/lib/pq"
)

const (
	pool     = "example_go"
	slots    = 8               // tasks at once in this process; what fits is the pool's business
	lease    = 2 * time.Second // as in the pool's config
	backstop = 30 * time.Second
)

type claimed struct {
	id      int64
	attempt int
	units   int
	payload []byte
	stop    context.CancelFunc
}

type worker struct {
	name    string
	db      *sql.DB
	wake    chan struct{} // a task has ended
	mutex   sync.Mutex
	running map[int64]*claimed
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 2 {
		log.Println("usage: worker NAME")
		os.Exit(2)
	}
	dsn := os.Getenv("PGPARK_DSN")
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		log.Fatal(err)
	}
	listener := pq.NewListener(dsn, 100*time.Millisecond, 5*time.Second, nil) // connects again by itself
	if err := listener.Listen("pgpark.pool." + pool); err != nil {
		log.Fatal(err)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	w := &worker{name: os.Args[1], db: db, wake: make(chan struct{}, 1), running: map[int64]*claimed{}}
	go w.heartbeats()
	for ctx.Err() == nil {
		if more, err := w.claim(); err != nil {
			log.Println(w.name, "cannot claim:", err) // the loop goes on when the database is there again
		} else if more {
			continue
		}
		select {
		case <-ctx.Done():
		case <-w.wake:
		case <-listener.Notify:
		case <-time.After(w.nextTimer()):
		}
	}
	w.release()
}

// claim starts what fits, and says whether there may be more.
func (w *worker) claim() (bool, error) {
	w.mutex.Lock()
	free := slots - len(w.running)
	w.mutex.Unlock()
	if free == 0 {
		return false, nil
	}
	rows, err := w.db.Query(
		`select task_id, attempt, units, payload from pgpark.park_claim(pool => $1, worker => $2, max_tasks => $3)`,
		pool, w.name, free)
	if err != nil {
		return false, err
	}
	defer rows.Close()
	count := 0
	for ; rows.Next(); count++ {
		task := &claimed{}
		if err := rows.Scan(&task.id, &task.attempt, &task.units, &task.payload); err != nil {
			return false, err
		}
		var running context.Context
		running, task.stop = context.WithCancel(context.Background())
		w.mutex.Lock()
		w.running[task.id] = task
		w.mutex.Unlock()
		fmt.Printf("%s: task %d, attempt %d, %d units\n", w.name, task.id, task.attempt, task.units)
		go w.run(running, task)
	}
	return count == free, rows.Err()
}

func (w *worker) run(ctx context.Context, task *claimed) {
	result, err := work(ctx, w.name, task.payload)
	w.mutex.Lock()
	_, ours := w.running[task.id] // not when it was released
	w.mutex.Unlock()
	if !ours {
		return
	}
	status, reason := "completed", sql.NullString{}
	if err != nil {
		status, reason = "failed", sql.NullString{String: err.Error(), Valid: true}
	}
	var accepted bool
	err = w.db.QueryRow(
		`select pgpark.park_finish(task_id => $1, attempt => $2, status => $3, result => $4, reason => $5)`,
		task.id, task.attempt, status, result, reason).Scan(&accepted)
	if err != nil {
		log.Println(w.name, "cannot finish:", err) // its lease lapses, and somebody does it again
	} else if !accepted {
		log.Printf("%s: task %d was no longer ours", w.name, task.id)
	}
	w.mutex.Lock()
	delete(w.running, task.id)
	w.mutex.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// work is the work; it stops when it is told to.
func work(ctx context.Context, name string, payload []byte) (sql.NullString, error) {
	var prompt struct {
		Prompt  string
		Seconds float64
	}
	if err := json.Unmarshal(payload, &prompt); err != nil {
		return sql.NullString{}, err
	}
	select {
	case <-ctx.Done():
		return sql.NullString{}, ctx.Err()
	case <-time.After(time.Duration(prompt.Seconds * float64(time.Second))):
	}
	text, err := json.Marshal(map[string]string{"answer": prompt.Prompt + ": done", "by": name})
	return sql.NullString{String: string(text), Valid: err == nil}, err
}

func (w *worker) heartbeats() {
	for range time.Tick(lease / 3) {
		w.mutex.Lock()
		ids := make([]int64, 0, len(w.running))
		for id := range w.running {
			ids = append(ids, id)
		}
		w.mutex.Unlock()
		var stop []int64
		err := w.db.QueryRow(
			`select array(select pgpark.park_heartbeat(pool => $1, worker => $2, task_ids => $3))`,
			pool, w.name, pq.Array(ids)).Scan(pq.Array(&stop))
		if err != nil {
			log.Println(w.name, "cannot send a heartbeat:", err)
		}
		w.mutex.Lock()
		for _, id := range stop { // cancelled, out of time, or lost
			if task, ours := w.running[id]; ours {
				task.stop()
			}
		}
		w.mutex.Unlock()
	}
}

// nextTimer runs the timers that are due, and says when the next one is.
func (w *worker) nextTimer() time.Duration {
	var due sql.NullFloat64
	err := w.db.QueryRow(
		`select extract(epoch from next_due - clock_timestamp()) from pgpark.park_maintain(pool => $1)`, pool).Scan(&due)
	pause := time.Duration(due.Float64 * float64(time.Second))
	switch {
	case err != nil:
		return time.Second
	case !due.Valid || pause > backstop:
		return backstop
	case pause < 20*time.Millisecond:
		return 20 * time.Millisecond
	}
	return pause
}

// release puts back what is not done, in its old place.
func (w *worker) release() {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	for id, task := range w.running {
		delete(w.running, id)
		if _, err := w.db.Exec(`select pgpark.park_release(task_id => $1, attempt => $2)`, id, task.attempt); err != nil {
			log.Println(w.name, "cannot release:", err)
		}
		task.stop()
	}
}
