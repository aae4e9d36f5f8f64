package fastvlm.app

import android.app.Activity
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import fastvlm.FastVlm
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.MainScope
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** Choose a picture, ask, and read the answer as it comes. */
class MainActivity : Activity() {
    private val scope: CoroutineScope = MainScope()
    private var model: FastVlm? = null
    private var answering: Job? = null
    private var chosen: Uri? = null
    private lateinit var question: EditText
    private lateinit var answer: TextView

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        question = EditText(this).apply { setText(QUESTION) }
        answer = TextView(this)
        val column = LinearLayout(this).apply { orientation = LinearLayout.VERTICAL }
        column.addView(button("Choose a picture") { choose() })
        column.addView(question)
        column.addView(button("Ask") { ask() })
        column.addView(button("Stop") { answering?.cancel() })
        column.addView(answer)
        setContentView(ScrollView(this).apply { addView(column) })
    }

    override fun onDestroy() {
        scope.launch {
            answering?.cancelAndJoin()
            model?.close()
        }
        super.onDestroy()
    }

    private fun button(label: String, action: () -> Unit) = Button(this).apply {
        text = label
        setOnClickListener { action() }
    }

    private fun choose() {
        val intent = Intent(Intent.ACTION_GET_CONTENT).setType("image/*")
        @Suppress("DEPRECATION") // its successor needs a library
        startActivityForResult(intent, CHOOSE)
    }

    @Deprecated("of Activity")
    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        if (request == CHOOSE && result == RESULT_OK) chosen = data?.data
    }

    private fun ask() {
        val before = answering
        answering = scope.launch {
            before?.cancelAndJoin()
            answer.text = ""
            val opened = model ?: withContext(Dispatchers.IO) {
                FastVlm(bundleFolder(applicationContext), THREADS)
            }.also { model = it }
            val picture = chosen?.let { withContext(Dispatchers.IO) { readPicture(contentResolver, it) } }
            opened.answers(picture, question.text.toString(), MAX_NEW_TOKENS).collect { answer.append(it) }
        }
    }

    private companion object {
        const val QUESTION = "Describe the image."
        const val CHOOSE = 1
        const val THREADS = 4 // the fast cores of most phones
        const val MAX_NEW_TOKENS = 256
    }
}
