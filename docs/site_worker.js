// Browsers start no workers from files. There, the search runs in a hidden frame of the same page.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inner = this.frame.contentWindow
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      inner.importScripts = (...names) =>
        names.reduce((before, name) => before.then(() => this.load(name)), Promise.resolve())
      inner.addEventListener("error", (event) => this.dispatchEvent(new ErrorEvent("error", event)))
      this.load(url).then(() => {
        const waiting = this.waiting
        this.waiting = null
        waiting.forEach((data) => this.deliver(data))
      })
    }
    load(name) {
      return new Promise((done, failed) => {
        const script = this.frame.contentDocument.createElement("script")
        script.onload = done
        script.onerror = failed
        script.src = new URL(name, location.href)
        this.frame.contentDocument.body.append(script)
      })
    }
    deliver(data) {
      const inner = this.frame.contentWindow
      inner.dispatchEvent(new inner.MessageEvent("message", { data }))
    }
    postMessage(data) {
      this.waiting ? this.waiting.push(data) : this.deliver(data)
    }
    set onmessage(listener) {
      this.addEventListener("message", listener)
    }
    set onerror(listener) {
      this.addEventListener("error", listener)
    }
    terminate() {
      this.frame.remove()
    }
  }
  window.IFrameWorker = window.Worker = IFrameWorker
}
