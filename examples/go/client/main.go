// A client: submits tasks and goes away; comes back for the results, which wait in the mailbox of its tenant.
//
//	go run ./client submit      makes the pool, submits nine tasks, prints their ids
//	go run ./client fetch 9     waits for nine results, prints them, and takes them out of the mailbox
package main

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	"github.com/lib/pq"
)

const (
	pool     = "example_go"
	tenant   = "example_go"
	backstop = 10 * time.Second // a notification is a hint that can get lost
)

type task struct {
	Payload  map[string]any `json:"payload"`
	Units    int            `json:"units"`
	Tenant   string         `json:"tenant"`
	Priority string         `json:"priority"`
}

func main() {
	log.SetFlags(0)
	dsn := os.Getenv("PGPARK_DSN")
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
	switch {
	case len(os.Args) == 2 && os.Args[1] == "submit":
		err = submit(db)
	case len(os.Args) == 3 && os.Args[1] == "fetch":
		var count int
		if count, err = strconv.Atoi(os.Args[2]); err == nil {
			err = fetch(db, dsn, count)
		}
	default:
		log.Println("usage: client submit | fetch COUNT")
		os.Exit(2)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func submit(db *sql.DB) error {
	config := `{"max_units": 24, "lease_secs": 2}`
	if _, err := db.Exec(`select pgpark.park_put_pool(name => $1, config => $2)`, pool, config); err != nil {
		return err
	}
	var tasks []task
	for n, units := range []int{8, 16, 4, 12, 2, 6, 10, 3, 5} {
		priority := "normal"
		if n%3 == 0 {
			priority = "high"
		}
		payload := map[string]any{"prompt": fmt.Sprintf("prompt %d", n), "seconds": 0.5}
		tasks = append(tasks, task{payload, units, tenant, priority})
	}
	text, err := json.Marshal(tasks)
	if err != nil {
		return err
	}
	// A *sql.Tx takes the same query: then the tasks are there when it commits. A refusal (full, late, too large) is a
	// row, no error.
	rows, err := db.Query(
		`select task_id, accepted, reason from pgpark.park_submit_many(pool => $1, tasks => $2)`, pool, string(text))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id sql.NullInt64
		var accepted bool
		var reason sql.NullString
		if err := rows.Scan(&id, &accepted, &reason); err != nil {
			return err
		}
		if accepted {
			fmt.Println(id.Int64)
		} else {
			fmt.Println("refused:", reason.String)
		}
	}
	return rows.Err()
}

func fetch(db *sql.DB, dsn string, count int) error {
	listener := pq.NewListener(dsn, 100*time.Millisecond, 5*time.Second, nil) // connects again by itself
	defer listener.Close()
	if err := listener.Listen("pgpark.mailbox"); err != nil {
		return err
	}
	for {
		ids, lines, err := look(db, count)
		if err != nil {
			return err
		}
		if len(ids) >= count {
			for _, line := range lines {
				fmt.Println(line)
			}
			_, err = db.Exec(`select pgpark.park_ack(message_ids => $1)`, pq.Array(ids))
			return err
		}
		select {
		case <-listener.Notify:
		case <-time.After(backstop):
		}
	}
}

func look(db *sql.DB, count int) (ids []int64, lines []string, err error) {
	rows, err := db.Query(
		`select message_id, task_id, status, coalesce(payload::text, reason, '')
		 from pgpark.park_fetch(tenant => $1, max_messages => $2)`, tenant, count)
	if err != nil {
		return nil, nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var message, id int64
		var status, payload string
		if err := rows.Scan(&message, &id, &status, &payload); err != nil {
			return nil, nil, err
		}
		ids = append(ids, message)
		lines = append(lines, fmt.Sprintf("%d %s %s", id, status, payload))
	}
	return ids, lines, rows.Err()
}
