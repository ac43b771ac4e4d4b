package main
import _ "go.mau.fi/whatsmeow"
func main(){}
