// Reads Modelfiles and renders conversations as Ollama does: its own parser and its own template engine.
//
// Standard input has a JSON list of {"modelfile", "conversations": [[{"role", "content"}]]}; standard output a list of
// {"error", "commands": [[name, arguments]], "prompts"}, one for each.
package main

import (
	"bytes"
	"encoding/json"
	"log"
	"os"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/parser"
	"github.com/ollama/ollama/template"
)

type question struct {
	Modelfile     string          `json:"modelfile"`
	Conversations [][]api.Message `json:"conversations"`
}

type answer struct {
	Error    string      `json:"error"`
	Commands [][2]string `json:"commands"`
	Prompts  []string    `json:"prompts"`
}

func read(asked question) (answer, error) {
	var found answer
	file, err := parser.ParseFile(bytes.NewBufferString(asked.Modelfile))
	if err != nil {
		return found, err
	}
	for _, command := range file.Commands {
		found.Commands = append(found.Commands, [2]string{command.Name, command.Args})
		if command.Name != "template" {
			continue
		}
		parsed, err := template.Parse(command.Args)
		if err != nil {
			return found, err
		}
		for _, messages := range asked.Conversations {
			var prompt bytes.Buffer
			if err := parsed.Execute(&prompt, template.Values{Messages: messages}); err != nil {
				return found, err
			}
			found.Prompts = append(found.Prompts, prompt.String())
		}
	}
	return found, nil
}

func main() {
	var asked []question
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		log.Fatal(err)
	}
	answers := make([]answer, 0, len(asked))
	for _, one := range asked {
		found, err := read(one)
		if err != nil {
			found.Error = err.Error()
		}
		answers = append(answers, found)
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		log.Fatal(err)
	}
}
