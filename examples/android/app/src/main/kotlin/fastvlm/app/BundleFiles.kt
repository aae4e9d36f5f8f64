package fastvlm.app

import android.content.Context
import fastvlm.BundleConstants
import java.io.File

private const val FOLDER = "bundle"

/**
 * The bundle as a folder of files: ONNX Runtime opens weights by their path, which an asset does not have.
 *
 * Files are copied out of the assets once for each bundle. A model that is downloaded, or comes as an asset pack, is
 * a folder already.
 */
fun bundleFolder(context: Context): File {
    val folder = File(context.filesDir, BundleConstants.MANIFEST_SHA256)
    if (folder.isDirectory) return folder
    val partial = File(context.filesDir, "${folder.name}.partial")
    partial.deleteRecursively()
    for (name in bundleFiles()) {
        val target = File(partial, name)
        target.parentFile!!.mkdirs()
        context.assets.open("$FOLDER/$name").use { source -> target.outputStream().use { source.copyTo(it) } }
    }
    check(partial.renameTo(folder)) { "cannot make $folder" }
    return folder
}

private fun bundleFiles(): Set<String> {
    val graphs = listOf(BundleConstants.VISION, BundleConstants.EMBED, BundleConstants.DECODER)
    return graphs.flatMap { it.files }.toSet() + setOf("fastvlm_manifest.json", "tokenizer.json")
}
